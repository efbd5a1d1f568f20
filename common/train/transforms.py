"""Dictionary transforms of training: every scan onto one grid, and the pair warped for validation."""

from collections.abc import Hashable, Mapping

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform

from common import InputError
from common.ops import warp
from common.run.align import PREALIGN, checked_grid_size, checked_spacing, plain_scan, refuse_huge, scan_tensor
from common.space import geometry, io
from common.space.prealign import prealign


class ToTrainingGridd(Transform):
    """Bring every training scan onto one grid: closest RAS axes, the wanted spacing, the space of a reference scan.

    Args:
        spacing: voxel size in mm; None or 0 keeps that of the scan (or of the reference).
        prealign: "affine" or "rigid" to the reference, or "none" for scans that share a grid already.
        reference: path of the scan to align to; needed unless `prealign` is "none".
        keys: scan and label map.
        grid_size: voxels of the grid, in closest RAS order, around its middle; None covers the scan.
    """

    def __init__(
        self,
        spacing: float | None,
        prealign: str = "none",
        *,
        reference: str | None = None,
        keys: tuple[str, str] = ("image", "label"),
        grid_size: tuple[int, int, int] | None = None,
    ) -> None:
        if prealign not in PREALIGN:
            raise InputError(f"--prealign must be one of {', '.join(PREALIGN)}, got {prealign}")
        self.spacing, self.prealign, self.reference, self.keys = checked_spacing(spacing), prealign, reference, keys
        self.grid_size = checked_grid_size(grid_size)
        self.target: tuple[np.ndarray, np.ndarray] | None = None  # the reference scan, once read

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        scan, label = self.keys
        array, affine = plain_scan(data[scan])
        name = data[scan].meta["filename_or_obj"]
        target, target_affine, matrix = array, affine, None
        if self.prealign != "none":
            self.target = self.target or io.read_scan(self.reference)
            target, target_affine = self.target
            if str(name) != str(self.reference):
                matrix = prealign(target[0], target_affine, array[0], affine, self.prealign)
        size, onto = geometry.working_grid(target.shape[1:], target_affine, self.spacing, grid_size=self.grid_size)
        refuse_huge(size, self.spacing)
        data[scan] = scan_tensor(geometry.to_working_grid(array, affine, size, onto, matrix), onto, name)
        if label in data:
            values = geometry.to_working_grid(plain_scan(data[label])[0], affine, size, onto, matrix, nearest=True)
            data[label] = scan_tensor(values, onto, name)
        return data


class PseudoT2d(Transform):
    """Turn the contrast of a T1-like scan in [0, 1] over, label by label: what was bright is dark.

    y(x) = 1 - m - (image(x) - m) / 2 with m the mean of the label that x is in; the background of exactly 0 stays.
    Without a label map, or where none is, the foreground counts as one label.

    Args:
        key, label_key: the scan, (1, I, J, K), and its label map.

    Source: a stand-in for T2 (cerebrospinal fluid bright, white matter dark) of the same person, to validate on.
    """

    def __init__(self, key: str = "moving", label_key: str = "moving_label") -> None:
        self.key, self.label_key = key, label_key

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        scan = data[self.key]
        image = scan.as_tensor()
        label = data[self.label_key].as_tensor().round().long() if self.label_key in data else image.long() * 0
        number = label.unique(return_inverse=True)[1].flatten()
        inside = (image > 0).flatten()
        total, count = (torch.bincount(number, weights=w.double()) for w in (image.flatten() * inside, inside))
        mean = (total / count.clamp(min=1)).float()[number].view(image.shape)
        turned = (1 - mean - (image - mean) / 2).clamp(0.01, 1)
        data[self.key] = MetaTensor(torch.where(image > 0, turned, 0), affine=scan.affine, meta=dict(scan.meta))
        return data


class WarpPaird(Transform):
    """Apply "pred" to the pair on its grid, for validation: adds "warped" and, with labels, "warped_label".

    "target_label" stacks the fixed and the moving label map, "set" repeats "kind" where the pair has one: MONAI's
    metrics see only what post-processing adds.
    """

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        disp = torch.as_tensor(data["pred"])[None].float()
        moving = torch.as_tensor(data["image"]).chunk(2)[0][None].to(disp.device)
        data["warped"] = warp(moving, disp)[0]
        if "moving_label" in data and "fixed_label" in data:
            label = torch.as_tensor(data["moving_label"])[None].to(disp)  # codes of training labels fit into float32
            data["warped_label"] = warp(label, disp, mode="nearest", padding="zeros")[0]
            data["target_label"] = torch.cat([torch.as_tensor(data[key]) for key in ("fixed_label", "moving_label")])
        if "kind" in data:
            data["set"] = data["kind"]
        return data
