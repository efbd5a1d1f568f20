"""Dictionary transforms of a pair, in the order of the working path: load, align, grid, scale, pack, deliver."""

import time
from collections.abc import Hashable, Mapping
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from torch import Tensor

from common import geometry, io, mapping, progress
from common.io import InputError
from common.metrics import label_overlap, mean_over_labels, ncc, regularity, ssim
from common.ops import warp
from common.prealign import prealign

PREALIGN = ("affine", "rigid", "none")


def _meta(array: np.ndarray, affine_ras: np.ndarray, name: str) -> MetaTensor:
    return MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(affine_ras), meta={"filename_or_obj": name})


def _numpy(scan: MetaTensor) -> tuple[np.ndarray, np.ndarray]:
    return scan.numpy(), np.asarray(scan.affine, dtype=np.float64)


def _spacing(value: float | None) -> float | None:
    if value is None or (isinstance(value, (int, float)) and value >= 0):
        return value or None
    raise InputError(f"--spacing must be a size in mm, or 0 for that of the scan, got {value}")


class LoadScansd(Transform):
    """Replace the paths under `keys`, KEY_label and KEY_mask by (C, I, J, K) MetaTensors in their own space; absent
    keys stay so.

    Raises:
        InputError: what `io.read_scan` refuses, a constant scan, a label map or mask of another shape than its scan.
    """

    def __init__(self, keys: tuple[str, ...] = ("moving", "fixed"), label_keys: tuple[str, ...] | None = None) -> None:
        self.keys = tuple(keys)
        self.label_keys = tuple(label_keys) if label_keys else tuple(f"{key}_label" for key in keys)

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data) | {"started": time.time()}
        progress.stage("loading")
        for key, label_key in zip(self.keys, self.label_keys):
            path = str(data[key])
            array, affine = io.read_scan(path)
            for number, channel in enumerate(array):
                if channel.min() == channel.max():
                    which = f"channel {number} " if len(array) > 1 else ""
                    raise InputError(f"{path}: {which}is constant, every voxel is {channel.min():g}")
            data[key] = _meta(array, affine, path)
            for name, kind in ((label_key, "label map"), (f"{key}_mask", "mask")):
                if name in data:
                    data[name] = _load_beside(str(data[name]), kind, path, array, affine)
        return data


def _load_beside(path: str, kind: str, scan_path: str, scan: np.ndarray, scan_affine: np.ndarray) -> MetaTensor:
    """A label map or mask, checked against its scan."""
    label, affine = io.read_scan(path)
    if len(label) > 1 or not (label == np.rint(label)).all():
        found = f"{len(label)} channels" if len(label) > 1 else "values that are not whole numbers"
        raise InputError(f"{path}: a {kind} has one channel of whole numbers, this one has {found}")
    if label.shape[1:] != scan.shape[1:]:
        sizes = f"shape {label.shape[1:]}, its scan {scan_path} has {scan.shape[1:]}"
        raise InputError(f"{path}: the {kind} has {sizes}")
    if not np.allclose(affine, scan_affine, atol=1e-2):
        raise InputError(f"{path}: the {kind} lies elsewhere in space than its scan {scan_path}")
    return _meta(label, scan_affine, path)


class AlignAndGridd(Transform):
    """Pre-align the pair and resample both scans onto the working grid of the fixed one.

    Adds "matrix" (4x4, RAS mm, fixed space -> moving space), "moving_work" and "fixed_work"; with masks also "mask"
    (2, I, J, K), 0 or 1 on the working grid, moving then fixed, all 1 for a scan without.

    Args:
        spacing: voxel size of the working grid in mm; None or 0 keeps the fixed scan's.
        prealign: "affine", "rigid" or "none" (the scans already overlap in world space).
        channels: number that the network takes; None checks only that both scans have the same.
        divisor: sizes of the working grid become multiples of this, so that the network adds no padding.
        crop: lay the grid around the foreground of a fixed scan with background 0; False covers all of its field of
            view. Instance normalisation sees the share of background, and a share unlike that of the training scans
            costs accuracy: True suits weights for whole organs, False those trained on crops around one.

    Raises:
        InputError: unknown `prealign`, different channel counts, scans that do not overlap after the alignment.
    """

    def __init__(
        self,
        spacing: float | None,
        prealign: str = "affine",
        *,
        channels: int | None = None,
        divisor: int = 16,
        crop: bool = True,
    ) -> None:
        if prealign not in PREALIGN:
            raise InputError(f"--prealign must be one of {', '.join(PREALIGN)}, got {prealign}")
        self.spacing, self.prealign, self.channels = _spacing(spacing), prealign, channels
        self.divisor, self.crop = divisor, crop

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        (moving, moving_affine), (fixed, fixed_affine) = _numpy(data["moving"]), _numpy(data["fixed"])
        names = [data[key].meta["filename_or_obj"] for key in ("moving", "fixed")]
        if len(moving) != len(fixed):
            raise InputError(f"{names[0]}: has {len(moving)} channels, the fixed scan {names[1]} has {len(fixed)}")
        if self.channels is not None and len(fixed) != self.channels:
            raise InputError(f"{names[1]}: has {len(fixed)} channels, these weights take {self.channels}")
        progress.stage(f"{self.prealign} alignment")
        matrix = prealign(fixed[0], fixed_affine, moving[0], moving_affine, self.prealign)
        progress.stage("resampling")
        box = geometry.foreground_box(fixed[0]) if self.crop else None
        size, onto = geometry.working_grid(fixed.shape[1:], fixed_affine, self.spacing, box=box, divisor=self.divisor)
        moving_work = geometry.to_working_grid(moving, moving_affine, size, onto, matrix)
        fixed_work = geometry.to_working_grid(fixed, fixed_affine, size, onto)
        apart = not geometry.overlap(size, onto, moving.shape[1:], moving_affine, matrix)
        if geometry.is_stripped(moving[0]) and geometry.is_stripped(fixed[0]):
            apart = not ((moving_work[0] > 0) & (fixed_work[0] > 0)).any()
        if apart:
            hint = "" if self.prealign != "none" else "; try --prealign affine"
            raise InputError(f"{names[0]}: does not overlap the fixed scan {names[1]} at all{hint}")
        if "moving_mask" in data or "fixed_mask" in data:
            masks = [np.ones((1, *size), np.float32)] * 2
            for number, (key, onto_moving) in enumerate((("moving_mask", matrix), ("fixed_mask", None))):
                if key in data:
                    mask, mask_affine = _numpy(data[key])
                    masks[number] = geometry.to_working_grid(mask, mask_affine, size, onto, onto_moving, nearest=True)
            data["mask"] = _meta((np.concatenate(masks) > 0).astype(np.float32), onto, names[1])
        data["matrix"] = torch.from_numpy(matrix)
        data["moving_work"], data["fixed_work"] = (_meta(x, onto, n) for x, n in zip((moving_work, fixed_work), names))
        return data


class ScaleForegroundd(Transform):
    """Scale each channel to [0, 1]: (x - low) / (high - low), clipped.

    Without a range, low is `geometry.foreground_floor` (0 for skull-stripped MR, air for CT) and high the 99.5th
    percentile of the voxels above it: the rule that the shipped weights were trained with.

    Args:
        keys: scans to scale.
        intensity_range: (low, high) for scans whose values have a unit, as [-1000, 1000] for CT.
    """

    def __init__(self, keys: tuple[str, ...], intensity_range: tuple[float, float] | None = None) -> None:
        if intensity_range is not None and not (len(intensity_range) == 2 and intensity_range[0] < intensity_range[1]):
            raise InputError(f"--intensity_range must be [low, high] with low < high, got {intensity_range}")
        self.keys, self.range = tuple(keys), intensity_range

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        for key in self.keys:
            scan = data[key].float()
            for channel in scan:
                low, high = self.range or self._range(channel.numpy())
                channel.copy_(((channel - low) / max(high - low, 1e-12)).clamp(0, 1))
            data[key] = scan
        return data

    @staticmethod
    def _range(channel: np.ndarray) -> tuple[float, float]:
        low = geometry.foreground_floor(channel)
        inside = channel[channel > low]
        return low, float(np.percentile(inside, 99.5)) if len(inside) else low + 1.0


class PackPaird(Transform):
    """Concatenate moving then fixed into "image" (2C, I, J, K), with the fixed scan's space; drop the two keys."""

    def __init__(self, moving: str = "moving_work", fixed: str = "fixed_work") -> None:
        self.moving, self.fixed = moving, fixed

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        moving, fixed = data.pop(self.moving), data.pop(self.fixed)
        if moving.shape != fixed.shape:
            grids = f"has grid {tuple(moving.shape[1:])}, {fixed.meta['filename_or_obj']} has {tuple(fixed.shape[1:])}"
            hint = "align them to one grid (--prealign affine)"
            raise InputError(f"{moving.meta['filename_or_obj']}: {grids}; {hint}")
        meta = {name: value for name, value in fixed.meta.items() if name != "affine"}
        image = MetaTensor(torch.cat([moving.as_tensor(), fixed.as_tensor()]), affine=fixed.affine, meta=meta)
        return data | {"image": image}


class WarpPaird(Transform):
    """Apply "pred" to the pair on its grid, for validation: adds "warped" and, with labels, "warped_label".

    "target_label" stacks the fixed and the moving label map: MONAI's metrics see only what post-processing adds.
    """

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        disp = torch.as_tensor(data["pred"])[None].float()
        moving = torch.as_tensor(data["image"]).chunk(2)[0][None].to(disp.device)
        data["warped"] = warp(moving, disp)[0]
        if "moving_label" in data and "fixed_label" in data:
            label = torch.as_tensor(data["moving_label"])[None].to(disp.device)
            data["warped_label"] = warp(label, disp, mode="nearest", padding="zeros")[0]
            data["target_label"] = torch.cat([torch.as_tensor(data[key]) for key in ("fixed_label", "moving_label")])
        return data


class ToTrainingGridd(Transform):
    """Bring every training scan onto one grid: closest RAS axes, the wanted spacing, the space of a reference scan.

    Args:
        spacing: voxel size in mm; None or 0 keeps that of the scan (or of the reference).
        prealign: "affine" or "rigid" to the reference, or "none" for scans that share a grid already.
        reference: path of the scan to align to; needed unless `prealign` is "none".
        keys: scan and label map.
    """

    def __init__(
        self,
        spacing: float | None,
        prealign: str = "none",
        *,
        reference: str | None = None,
        keys: tuple[str, str] = ("image", "label"),
    ) -> None:
        if prealign not in PREALIGN:
            raise InputError(f"--prealign must be one of {', '.join(PREALIGN)}, got {prealign}")
        self.spacing, self.prealign, self.reference, self.keys = _spacing(spacing), prealign, reference, keys
        self.target: tuple[np.ndarray, np.ndarray] | None = None  # the reference scan, once read

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        scan, label = self.keys
        array, affine = _numpy(data[scan])
        name = data[scan].meta["filename_or_obj"]
        target, target_affine, matrix = array, affine, None
        if self.prealign != "none":
            self.target = self.target or io.read_scan(self.reference)
            target, target_affine = self.target
            if str(name) != str(self.reference):
                matrix = prealign(target[0], target_affine, array[0], affine, self.prealign)
        size, onto = geometry.working_grid(target.shape[1:], target_affine, self.spacing)
        data[scan] = _meta(geometry.to_working_grid(array, affine, size, onto, matrix), onto, name)
        if label in data:
            values = geometry.to_working_grid(_numpy(data[label])[0], affine, size, onto, matrix, nearest=True)
            data[label] = _meta(values, onto, name)
        return data


class DeliverPaird(Transform):
    """From the displacement on the working grid to results in the fixed scan's own space, written and measured.

    Writes OUT/ID/ with warped.nii.gz, transform.h5 (ITK composite: the displacement field on the working grid, then the
    affine), displacement.nii.gz (the whole map on the fixed grid, mm, LPS vectors), and, where they apply,
    warped_label.nii.gz and inverse_transform.h5. The original moving scan is interpolated once. Adds "row", the pair's
    line of results.csv.

    Args:
        output_dir: OUT.
        save_inverse: also write the inverse transform and report its error.
        surface: also measure SSIM of the scans and HD, HD95 and ASSD of the labels (slow for many labels).
        minimum: labels of at most this many voxels in the fixed map are left out of the means.
        groups: coarse label groups as {name: {"members": [...]}}; adds the mean Dice over them.
    """

    def __init__(
        self,
        output_dir: str,
        *,
        save_inverse: bool = False,
        surface: bool = False,
        minimum: int = 0,
        groups: dict | None = None,
        save: bool = True,
    ) -> None:
        self.output_dir, self.save_inverse, self.surface = Path(output_dir), save_inverse, surface
        self.minimum, self.groups, self.save = minimum, groups, save

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        progress.stage("warping and measuring")
        disp = torch.as_tensor(data["pred"]).cpu().float()
        onto = np.asarray(data["image"].affine, dtype=np.float64)
        matrix = np.asarray(data["matrix"], dtype=np.float64)
        affine = mapping.affine_transform(matrix)
        whole = mapping.compose(mapping.displacement_transform(disp.numpy(), onto), affine)
        (moving, moving_affine), (fixed, fixed_affine) = _numpy(data["moving"].cpu()), _numpy(data["fixed"].cpu())
        size = fixed.shape[1:]
        outside = [io.background(channel) for channel in moving]
        warped = np.stack(
            [mapping.resample(c, moving_affine, size, fixed_affine, whole, outside=o) for c, o in zip(moving, outside)]
        )
        row = {
            "id": data["id"],
            "fixed": data["fixed"].meta["filename_or_obj"],
            "moving": data["moving"].meta["filename_or_obj"],
        }
        row |= self._similarity(fixed, warped, moving, moving_affine, fixed_affine, affine)
        writers = {
            "warped.nii.gz": lambda path: io.write_scan(warped, fixed_affine, path),
            "transform.h5": lambda path: mapping.write_transform(whole, path),
            "displacement.nii.gz": lambda path: io.write_image(
                mapping.displacement_image(whole, size, fixed_affine), path
            ),
        }
        if "moving_label" in data:
            label = data["moving_label"].cpu().numpy()[0]
            warped_label = np.rint(mapping.resample(label, moving_affine, size, fixed_affine, whole, nearest=True))
            writers["warped_label.nii.gz"] = lambda path: io.write_label(warped_label, fixed_affine, path)
            if "fixed_label" in data:
                before = np.rint(mapping.resample(label, moving_affine, size, fixed_affine, affine, nearest=True))
                row |= self._overlap(data["fixed_label"].cpu().numpy()[0], before, warped_label, label, fixed_affine)
        row |= _field_measures(disp, data["image"], onto)
        if self.save_inverse:
            back = mapping.invert(whole)
            error = mapping.inverse_error_mm(whole, back, size, fixed_affine)[
                fixed[0] > geometry.foreground_floor(fixed[0])
            ]
            row |= {"inverse_error_mm": float(error.mean()), "inverse_error_p99_mm": float(np.percentile(error, 99))}
            writers["inverse_transform.h5"] = lambda path: mapping.write_transform(back, path)
        if self.save:
            progress.stage("writing")
            io.write_folder(self.output_dir / data["id"], writers)
        row["warnings"] = progress.take_notes()
        row["seconds"] = time.time() - float(data["started"])
        return data | {"row": {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}}

    def _similarity(self, fixed, warped, moving, moving_affine, fixed_affine, affine) -> dict[str, float]:
        outside = io.background(moving[0])
        start = mapping.resample(moving[0], moving_affine, fixed.shape[1:], fixed_affine, affine, outside=outside)
        f, s, w = (torch.from_numpy(np.ascontiguousarray(x)) for x in (fixed[0], start, warped[0]))
        inside, there = f > geometry.foreground_floor(fixed[0]), s > geometry.foreground_floor(moving[0])
        overlap = 2 * float((there & inside).sum()) / max(float(there.sum() + inside.sum()), 1.0)
        row = {"overlap": overlap, "ncc_before": ncc(s, f, inside), "ncc_after": ncc(w, f, inside)}
        if self.surface:
            row |= {"ssim_before": ssim(_scaled(s), _scaled(f)), "ssim_after": ssim(_scaled(w), _scaled(f))}
        return row

    def _overlap(self, fixed, before, after, moving, fixed_affine) -> dict[str, float]:
        f, b, a, m = (torch.from_numpy(np.ascontiguousarray(x)).long() for x in (fixed, before, after, moving))
        spacing = tuple(np.linalg.norm(fixed_affine[:3, :3], axis=0)) if self.surface else None
        scores = {
            name: label_overlap(f, warped, m, spacing=spacing, minimum=self.minimum)
            for name, warped in (("before", b), ("after", a))
        }
        row = {
            "labels": len(scores["after"]),
            "labels_lost": sum(n not in set(a.unique().tolist()) for n in scores["after"]),
        }
        for name, other, warped in (("before", "after", b), ("after", "before", a)):
            for kind in next(iter(scores[name].values()), {}):
                row[f"{kind}_{name}"] = mean_over_labels(scores[name], kind, beside=scores[other])
            if self.groups:
                table = group_table(self.groups, int(max(f.max(), b.max(), a.max(), m.max())))
                row[f"dice_coarse_{name}"] = mean_over_labels(label_overlap(table[f], table[warped], table[m]), "dice")
        return row


def group_table(groups: dict, largest: int) -> Tensor:
    """Look-up table label -> number of its group (from 1), 0 for labels of no group."""
    members = [int(n) for group in groups.values() for n in group["members"]]
    table = torch.zeros(max(largest, *members) + 1, dtype=torch.long)
    for number, group in enumerate(groups.values(), 1):
        table[torch.tensor([int(n) for n in group["members"]])] = number
    return table


def _field_measures(disp: Tensor, image: MetaTensor, onto: np.ndarray) -> dict[str, float]:
    """Length of the displacement in mm and its regularity, inside the fixed scan's foreground."""
    inside = _foreground(image)
    length = geometry.length_mm(disp.numpy(), onto)[inside.numpy()]
    measures = {"disp_mean_mm": float(length.mean()), "disp_max_mm": float(length.max())}
    return measures | regularity(disp[None], inside)


def _foreground(image: MetaTensor) -> Tensor:
    """(I, J, K) voxels of the packed pair's fixed scan above 0; all, if there are none."""
    inside = torch.as_tensor(image).cpu()[len(image) // 2] > 0
    return inside if inside.any() else torch.ones_like(inside)


def _scaled(scan: Tensor) -> Tensor:
    """A scan (I, J, K) in [0, 1] as (1, 1, I, J, K), by its own smallest and largest value."""
    low, high = scan.min(), scan.max()
    return ((scan - low) / (high - low).clamp(min=1e-12))[None, None]
