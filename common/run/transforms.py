"""Dictionary transforms of a pair, in the order of the working path: load, align, grid, scale, pack, deliver."""

import dataclasses
import math
import time
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform

from common import InputError
from common.ops import plain
from common.quality import measure, report, verdict
from common.run import forecast, outputs, progress
from common.run.align import AlignAndGridd, landmarks_of, plain_scan, scan_tensor
from common.run.pipeline import RegisterDeformabled
from common.space import geometry, io, mapping, points
from common.space.headers import HEADERS
from common.space.transform_files import write_transform

# Beside what is here: the step between loading and scaling, and all of them in one, for pipelines of MONAI.
__all__ = ["AlignAndGridd", "RegisterDeformabled"]
WRITTEN = 2**21  # voxels of a fixed scan whose displacement is written without being asked for: some 15 MB
REPORTS = {"png": ("png",), "html": ("html",), "both": ("png", "html"), "none": ()}


class LoadScansd(Transform):
    """Replace the paths under `keys`, KEY_label and KEY_mask by (C, I, J, K) MetaTensors in their own space; absent
    keys stay so. Scans are float32, label maps whole numbers, masks 1 for what counts: what KEY_lesion marks does not,
    nor what lies within the margin of it. Masks may have another grid than their scan.

    Args:
        keys: of the scans.
        label_keys: of their label maps; KEY_label if not given.
        header: where NIfTI scans are: "sform" or "qform"; None is ITK's choice. What is doubtful is noted for the row.
        series: UID or description of the DICOM series, in a folder of several; a list if the scans' differ.
        lesion_margin: mm by which lesions are widened; a pair's own "lesion_margin" wins.

    Raises:
        InputError: what `io.read_scan` refuses, a constant scan, a label map of another shape than its scan, a mask
            elsewhere in space, or one that leaves nothing.
    """

    def __init__(
        self,
        keys: tuple[str, ...] = ("moving", "fixed"),
        label_keys: tuple[str, ...] | None = None,
        *,
        header: str | None = None,
        series: str | Sequence[str] | None = None,
        lesion_margin: float = 0.0,
    ) -> None:
        if header and header not in HEADERS:
            raise InputError(f"--header must be one of {', '.join(HEADERS)}, got {header}")
        self.keys, self.header, self.series = tuple(keys), header or "", series or ""
        self.lesion_margin = lesion_margin
        self.label_keys = tuple(label_keys) if label_keys else tuple(f"{key}_label" for key in keys)

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data) | {"started": time.time()}
        progress.stage("loading")
        with progress.noting():
            self._load(data)
        return data

    def _load(self, data: dict) -> None:
        kinds = ("", "_label", "_points", "_mask", "_lesion")
        given = {f"{key}{kind}": data.get(f"{key}{kind}") for key in self.keys for kind in kinds}
        progress.put(inputs=report.inputs_of(given))
        for key, label_key in zip(self.keys, self.label_keys):
            path = str(data[key])
            array, affine = io.read_scan(path, header=self.header, series=self.series)
            io.refuse_constant(array, path)
            data[key] = scan_tensor(array, affine, path)
            if label_key in data:
                label = io.read_beside(str(data[label_key]), "label map", path, array, affine, self.header)
                data[label_key] = scan_tensor(label, affine, str(data[label_key]))
            if (mask := self._mask(data, key, array, affine)) is not None:
                data[f"{key}_mask"] = scan_tensor(mask, affine, path)
        if len(marks := [str(data[f"{key}_points"]) for key in self.keys if f"{key}_points" in data]) == 2:
            affines = [np.asarray(data[key].affine) for key in self.keys]
            points.read_matching(marks[0], affines[0], marks[1], affines[1])  # refused now, used at the end
        elif marks:
            key = next(key for key in self.keys if f"{key}_points" in data)
            points.read_points(marks[0], np.asarray(data[key].affine))

    def _mask(self, data: dict, key: str, scan: np.ndarray, affine: np.ndarray) -> np.ndarray | None:
        """(1, I, J, K) uint8, 1 for what counts of a scan: inside its mask and away from its lesion; None without."""
        found, files = None, {kind: str(data.pop(f"{key}_{kind}", "")) for kind in ("mask", "lesion")}
        for kind, file in files.items():
            if file:
                name = {"mask": "mask", "lesion": "lesion mask"}[kind]
                inside = io.read_mask(file, name, str(data[key].meta["filename_or_obj"]), scan, affine, self.header) > 0
                if kind == "lesion":
                    inside = ~geometry.dilated(inside[0], affine, data.get("lesion_margin", self.lesion_margin))[None]
                found = inside if found is None else found & inside
                if not found.any():
                    where = data[key].meta["filename_or_obj"]
                    hint = f"; what is to be left out is given as --{key}_lesion" if kind == "mask" else ""
                    raise InputError(f"{file}: the {name} leaves nothing of the scan {where} to look at{hint}")
        return None if found is None else found.astype(np.uint8)


class ScaleForegroundd(Transform):
    """Scale each channel to [0, 1]: (x - low) / (high - low), clipped.

    Without a range, it is that of `geometry.foreground_range`: the rule that the shipped weights were trained with; of
    what the "mask" of a pair does not leave out.

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
        for number, key in enumerate(self.keys):
            scan = data[key].float()
            counts = data["mask"][number].numpy() > 0 if "mask" in data else ...
            for channel in scan:
                low, high = self.range or geometry.foreground_range(channel.numpy()[counts])
                channel.copy_(((channel - low) / max(high - low, 1e-12)).clamp(0, 1))
            data[key] = scan
        return data


class PackPaird(Transform):
    """Concatenate moving then fixed into "image" (2C, I, J, K), with the fixed scan's space; drop the two keys.

    `name` is another name for the result.
    """

    def __init__(self, moving: str = "moving_work", fixed: str = "fixed_work", name: str = "image") -> None:
        self.moving, self.fixed, self.name = moving, fixed, name

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        moving, fixed = data.pop(self.moving), data.pop(self.fixed)
        if moving.shape != fixed.shape:
            grids = f"has grid {tuple(moving.shape[1:])}, {fixed.meta['filename_or_obj']} has {tuple(fixed.shape[1:])}"
            hint = "align them to one grid (--prealign affine)"
            raise InputError(f"{moving.meta['filename_or_obj']}: {grids}; {hint}")
        meta = {name: value for name, value in fixed.meta.items() if name != "affine"}
        image = MetaTensor(torch.cat([moving.as_tensor(), fixed.as_tensor()]), affine=fixed.affine, meta=meta)
        return data | {self.name: image}


class DeliverPaird(Transform):
    """From the displacement on the working grid to results in the fixed scan's own space, written, measured, judged.

    Writes OUT/ID/ with warped.nii.gz, transform.h5 (ITK composite: the displacement field on the working grid, then the
    affine), displacement.nii.gz (the whole map on the fixed grid, mm, LPS vectors), report.json, report.png, and, where
    they apply, warped_label.nii.gz, warped_points.csv (the moving points in the fixed space, LPS mm),
    inverse_transform.h5, and warped_segmentation.nii.gz and fixed_segmentation.nii.gz of a method that gave such class
    numbers on the working grid. The original moving scan is interpolated once. Adds "row", the pair's line of
    results.csv.

    Args:
        output_dir: OUT.
        save_inverse: also write the inverse transform and report the error of that file; without, the report says how
            far the map is from one-to-one at a sample of voxels.
        surface: also measure HD, HD95 and ASSD of the labels and SSIM of the scans; None: only the distances, and only
            of few labels, as they are slow.
        minimum: labels of at most this many voxels in the fixed map are left out of the means.
        groups: coarse label groups as {name: {"members": [...]}}; adds the mean Dice over them.
        save: False measures only.
        displacement: whether to write displacement.nii.gz, which says what transform.h5 says, in ten times the bytes;
            None: of fixed scans of up to WRITTEN voxels.
        report: what is drawn: "png" report.png, "html" report.html and the thumbnail for the cohort's page, "both",
            or "none".
        neurological: draw the patient's left on the left.
        midspace: also write both scans in the space in their middle, and the transforms from there to each.
        trained_on: what the weights were trained on, a key of `common.quality.verdict.TRAINING`; None or "" if they
            were not.
    """

    def __init__(
        self,
        output_dir: str,
        *,
        save_inverse: bool = False,
        surface: bool | None = None,
        minimum: int = 0,
        groups: dict | None = None,
        save: bool = True,
        displacement: bool | None = None,
        report: str = "both",
        neurological: bool = False,
        trained_on: str | None = None,
        midspace: bool = False,
    ) -> None:
        if report not in REPORTS:
            raise InputError(f"--report must be one of {', '.join(REPORTS)}, got {report}")
        if trained_on and trained_on not in verdict.TRAINING:
            raise InputError(f"--trained_on must be one of {', '.join(verdict.TRAINING)}, got {trained_on}")
        self.output_dir, self.save_inverse, self.surface = Path(output_dir), save_inverse, surface
        self.minimum, self.groups, self.save, self.trained_on = minimum, groups, save, trained_on or None
        self.displacement, self.report, self.midspace = displacement, report, midspace
        self.neurological = neurological

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        progress.stage("warping")
        pair = _registration(data)
        warped = measure.warp_pair(pair, **({"lattice": pair.fixed[0].size} if self.surface else {}))
        progress.stage("measuring")
        found, details = measure.measure(pair, warped, surface=self.surface, minimum=self.minimum, groups=self.groups)
        if self.groups and math.isnan(found.get("dice_coarse_after", 0.0)):
            progress.remark("--groups: no label of theirs is in both label maps")
        small = pair.fixed[0].size <= WRITTEN
        whole = small if self.displacement is None else self.displacement
        writers = outputs.files_of(pair, warped, whole, points_like=str(data.get("moving_points", "")))
        if self.midspace:
            writers |= outputs.middle_files(pair)
        for name in ("warped_segmentation", "fixed_segmentation"):
            if name in data:
                writers[f"{name}.nii.gz"] = partial(outputs.write_classes, data[name], pair)
        if self.save_inverse:
            inverse = mapping.invert(pair.whole)
            found |= measure.inverse_error(pair, inverse)
            writers["inverse_transform.h5"] = partial(write_transform, inverse)
        names = {role: data[role].meta["filename_or_obj"] for role in ("fixed", "moving")}
        scans = {names["moving"]: pair.moving[0], names["fixed"]: pair.fixed[0]}
        halves = dict(zip(scans, (half[0].numpy() for half in pair.work.chunk(2))))
        notes, facts = progress.take()
        notes += verdict.judge_scans(scans, halves, self.trained_on) + verdict.judge(found)
        row = {"id": data["id"]} | names | found
        row |= {} if pair.measured is None else {"guides": int((~pair.measured).sum())}
        row |= {"warnings": verdict.joined(notes), "seconds": time.time() - float(data["started"])}
        peak = forecast.peak_memory(torch.as_tensor(data["pred"]).device)
        facts |= {"seconds": row["seconds"], "peak_memory_mib": None if peak is None else peak / 2**20}
        if self.save:
            progress.stage("writing")
            content = report.report(row, details, notes, facts)
            writers |= outputs.drawings(pair, content, REPORTS[self.report], neurological=self.neurological)
            writers["report.json"] = partial(outputs.write_report, content)  # the last
            io.write_folder(self.output_dir / data["id"], writers)
        row["seconds"] = time.time() - float(data["started"])
        data["delivered"] = dataclasses.replace(pair), warped, notes  # for a `Registrar`; without what is kept with it
        return data | {"row": {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}}


def _registration(data: Mapping[Hashable, object]) -> measure.Registration:
    """The pair of a bundle's run: displacement "pred" on the working grid of "image", then "matrix"."""
    disp = plain(torch.as_tensor(data["pred"])).cpu().float()
    onto = np.asarray(data["image"].affine, dtype=np.float64)
    start = mapping.affine_transform(np.asarray(data["matrix"], dtype=np.float64))
    scans = {role: plain_scan(data[role].cpu()) for role in ("moving", "fixed")}
    labels = {name: data[name].cpu().numpy()[0] for name in ("moving_label", "fixed_label") if name in data}
    return measure.Registration(
        *scans["moving"],
        *scans["fixed"],
        start=start,
        whole=mapping.compose(mapping.displacement_transform(disp.numpy(), onto), start),
        work=plain(torch.as_tensor(data["image"])).cpu().float(),
        disp=disp,
        work_affine=onto,
        **labels,
        **landmarks_of(data, {role: affine for role, (_, affine) in scans.items()}),
        measured=np.asarray(data["measured"]) if "measured" in data else None,
    )
