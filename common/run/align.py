"""Both scans of a pair on one working grid: the alignment, what they start from, and which points guide."""

import math
import warnings
from collections.abc import Hashable, Mapping

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform

from common import InputError, RegistrationWarning
from common.run import forecast, progress
from common.space import geometry, mapping, middle, points
from common.space.prealign import fit_points, prealign
from common.space.transform_files import read_transform

KEYS = ("moving", "fixed")
PREALIGN = ("affine", "rigid", "none")
Scan = tuple[np.ndarray, np.ndarray]  # (C, I, J, K) and its affine_ras


def scan_tensor(array: np.ndarray, affine_ras: np.ndarray, name: str) -> MetaTensor:
    return MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(affine_ras), meta={"filename_or_obj": name})


def plain_scan(scan: MetaTensor) -> Scan:
    return scan.numpy(), np.asarray(scan.affine, dtype=np.float64)


def checked_spacing(value: float | None) -> float | None:
    if value is None or (isinstance(value, (int, float)) and 0 <= value < math.inf):
        return value or None
    raise InputError(f"--spacing must be a size in mm, or 0 for that of the scan, got {value}")


def checked_grid_size(value: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
    if value is None or (len(value) == 3 and all(isinstance(n, int) and n > 1 for n in value)):
        return None if value is None else tuple(value)
    raise InputError(f"--grid_size must be three whole numbers of voxels, got {value}")


def refuse_huge(size: tuple[int, int, int], spacing: float | None) -> None:
    """Stop at a working grid whose two scans alone need more memory than there is, before it is made.

    Raises:
        InputError: such a grid.
    """
    free, needed = forecast.free_memory(torch.device("cpu")), 8 * math.prod(map(int, size))
    if min(size) < 1 or (free is not None and needed > free):  # below 1: so many that they are not counted
        grid = "more voxels than can be counted"
        if min(size) > 0:
            grid = f"{' x '.join(map(str, size))} voxels, the two scans alone need {needed / forecast.GIB:.0f} GiB"
            grid += f", {free / forecast.GIB:.1f} are free"
        where = f"--spacing {spacing:g}" if spacing else "the grid of the fixed scan"
        raise InputError(f"{where}: {grid}; take a larger --spacing")


class AlignAndGridd(Transform):
    """Pre-align the pair and resample both scans onto the working grid of the fixed one.

    Adds "matrix" (4x4, RAS mm, fixed space -> moving space), "moving_work" and "fixed_work"; with masks also "mask"
    (2, I, J, K), 0 or 1 on the working grid, moving then fixed, all 1 for a scan without. A path in "start" is that of
    a transform to start from, fixed -> moving: the matrices at its end are the alignment, and what comes before becomes
    a displacement on the working grid, "start" (3, I, J, K).

    Args:
        spacing: voxel size of the working grid in mm; None or 0 keeps the fixed scan's.
        prealign: "affine", "rigid" or "none" (the scans already overlap in world space).
        channels: number that the network takes; None checks only that both scans have the same.
        divisor: sizes of the working grid become multiples of this, so that the network adds no padding.
        crop: lay the grid around the foreground of a fixed scan with background 0; False covers all of its field of
            view. Instance normalisation sees the share of background, and a share unlike that of the training scans
            costs accuracy: True suits weights for whole organs, False those trained on crops around one.
        grid_size: voxels of the working grid, in closest RAS order, around its middle; None covers the scan.
        guide: above 0, the landmarks of the pair guide: the alignment starts from them, and "guides" (2, N, 3) are
            their voxels on the working grid, fixed then moving (aligned).
        holdout: share of the landmarks, evenly spread over their list, that do not guide, and are measured: "measured".
            A pair's own "guide" and "holdout_points" win.
        midspace: lay the working grid in the space in the middle of the scans, so that none of them is preferred: the
            alignment is done both ways, and "matrix" the mean of the two.

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
        grid_size: tuple[int, int, int] | None = None,
        guide: float = 0.0,
        holdout: float = 0.2,
        midspace: bool = False,
    ) -> None:
        if prealign not in PREALIGN:
            raise InputError(f"--prealign must be one of {', '.join(PREALIGN)}, got {prealign}")
        self.spacing, self.prealign, self.channels = checked_spacing(spacing), prealign, channels
        self.grid_size = checked_grid_size(grid_size)
        self.divisor, self.crop = divisor, crop
        self.guide, self.holdout, self.midspace = guide, holdout, midspace

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        scans, names = [plain_scan(data[key]) for key in KEYS], [data[key].meta["filename_or_obj"] for key in KEYS]
        counts = [len(scan) for scan, _ in scans]
        if counts[0] != counts[1]:
            raise InputError(f"{names[0]}: has {counts[0]} channels, the fixed scan {names[1]} has {counts[1]}")
        if self.channels is not None and counts[1] != self.channels:
            raise InputError(f"{names[1]}: has {counts[1]} channels, these weights take {self.channels}")
        start = self._start(data, names)
        if not self.midspace:
            (fixed, *_), affine = scans[1]
            size, onto = self._grid(fixed.shape, affine, geometry.foreground_box(fixed), names[1])
        progress.stage("no alignment" if self.prealign == "none" or start else f"{self.prealign} alignment")
        masks = [data[f"{key}_mask"].numpy()[0] if f"{key}_mask" in data else None for key in KEYS]
        guides = self._guides(data, names[1]) if data.get("guide", self.guide) else None
        if start:
            matrix, before = mapping.split(start)
            data |= {} if before is None else {"start": torch.from_numpy(mapping.disp_of(before, size, onto)).float()}
        else:
            matrix = self._aligned(scans, masks, guides)
        ways = matrix, np.eye(4)  # from the space of the grid, that of the fixed scan, into those of both scans
        if self.midspace:
            back = self._aligned(scans[::-1], masks[::-1], guides and guides[::-1])
            ways = middle.ways_from_middle(matrix, back)
            size, onto = self._middle_grid(scans, ways, names[1])
        data["matrix"] = torch.from_numpy(ways[0] @ np.linalg.inv(ways[1]))
        own = ways[1] @ onto
        if guides is not None:
            both = [nib.affines.apply_affine(np.linalg.inv(way @ onto), marks) for way, marks in zip(ways, guides)]
            data["guides"] = torch.from_numpy(np.stack(both[::-1]))
        progress.stage("resampling")
        work = [geometry.to_working_grid(*scan, size, onto, way) for scan, way in zip(scans, ways)]
        self._refuse_apart(scans, work, onto, ways[0], names)
        if any(mask is not None for mask in masks):
            both = np.ones((2, *size), np.float32)
            for half, mask, (_, affine), way in zip(both, masks, scans, ways):
                if mask is not None:
                    faces = np.concatenate([mask.take(end, axis).ravel() for axis in range(3) for end in (0, -1)])
                    options = {"nearest": True, "outside": float(faces.mean() > 0.5)}  # beyond it, as at its border
                    half[:] = geometry.to_working_grid(mask[None], affine, size, onto, way, **options)[0]
            data["mask"] = scan_tensor(both, own, names[1])
        return data | {f"{key}_work": scan_tensor(x, own, name) for key, x, name in zip(KEYS, work, names)}

    def _grid(self, size: tuple[int, ...], affine: np.ndarray, organ: tuple | None, name: str) -> mapping.Grid:
        """The working grid over a scan, or over the box of its foreground."""
        options = {"box": organ if self.crop else None, "divisor": self.divisor, "grid_size": self.grid_size}
        refuse_huge(geometry.working_grid(size, affine, self.spacing, **options)[0], self.spacing)
        spacing = geometry.fitting_spacing(size, affine, self.spacing, organ)
        if spacing != self.spacing:
            text = f"a grid of {self.spacing:g} mm voxels does not suit the size of {name}"
            progress.remark(f"{text}, one of {spacing:g} mm was used; choose another with --spacing")
        return geometry.working_grid(size, affine, spacing, **options)

    def _middle_grid(self, scans: list[Scan], ways: tuple[np.ndarray, np.ndarray], name: str) -> mapping.Grid:
        """The working grid over both scans, in the space in their middle."""
        organs = [geometry.foreground_box(scan[0]) if self.crop else None for scan, _ in scans]
        boxes = [middle.box_of(organ, scan.shape[1:], affine) for organ, (scan, affine) in zip(organs, scans)]
        return self._grid(*middle.middle_grid(boxes, ways), None, name)

    def _start(self, data: dict, names: list[str]) -> mapping.Transform | None:
        path = data.pop("start", None)
        if path and self.midspace:
            raise InputError(f"{names[0]}: --start and --midspace do not go together, a start is of one direction")
        return read_transform(path) if path else None

    def _aligned(self, scans: list[Scan], masks: list, guides: list[np.ndarray] | None) -> np.ndarray:
        """The matrix from the space of the second scan into that of the first."""
        (moving, moving_affine), (fixed, fixed_affine) = scans
        options = dict(zip(("moving_mask", "fixed_mask"), masks))
        if guides and self.prealign != "none":
            options["start"] = fit_points(guides[1], guides[0], scaled=self.prealign == "affine")
        return prealign(fixed[0], fixed_affine, moving[0], moving_affine, self.prealign, **options)

    def _refuse_apart(
        self, scans: list[Scan], work: list[np.ndarray], onto: np.ndarray, way: np.ndarray, names: list[str]
    ) -> None:
        (moving, affine), (fixed, _) = scans
        apart = not geometry.overlap(work[0].shape[1:], onto, moving.shape[1:], affine, way)
        if geometry.is_stripped(moving[0]) and geometry.is_stripped(fixed[0]):
            apart = not ((work[0][0] > 0) & (work[1][0] > 0)).any()
        if apart:
            hint = "" if self.prealign != "none" else "; try --prealign affine"
            raise InputError(f"{names[0]}: does not overlap the fixed scan {names[1]} at all{hint}")

    def _guides(self, data: dict, name: str) -> list[np.ndarray]:
        """Moving and fixed landmarks (N, 3) in RAS mm that guide; "measured" says which do not."""
        marks = landmarks_of(data, {role: np.asarray(data[role].affine) for role in KEYS})
        if len(marks) < 2:
            raise InputError(f"{name}: --guide needs landmarks of both scans, --moving_points and --fixed_points")
        number, holdout = np.arange(len(marks["fixed_points"].lps)), data.get("holdout_points", self.holdout)
        data["measured"] = np.floor((number + 1) * holdout + 1e-9) > np.floor(number * holdout + 1e-9)
        if data["measured"].all():
            raise InputError(f"{name}: with --holdout_points {holdout:g} none of its landmarks is left to guide")
        flip = np.array([-1.0, -1.0, 1.0])
        return [marks[f"{role}_points"].lps[~data["measured"]] * flip for role in KEYS]


def landmarks_of(data: Mapping[Hashable, object], affines: dict[str, np.ndarray]) -> dict[str, points.Points]:
    """Those that there are, without the ones that were never placed; what is left out was noted in loading."""
    given = {role: data[f"{role}_points"] for role in affines if f"{role}_points" in data}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegistrationWarning)
        if len(given) == 2:
            both = points.read_matching(given["moving"], affines["moving"], given["fixed"], affines["fixed"])
            return dict(zip(("moving_points", "fixed_points"), both))
        return {f"{role}_points": points.read_points(path, affines[role]) for role, path in given.items()}
