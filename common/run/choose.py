"""Which bundle and which options suit two scans: `--method auto` of the front door.

`facts_of` looks at the scans, `choose` is the rule. What each rule is worth, beside the other methods:
`python tests/bench/bench_auto.py`.
"""

from typing import Any, NamedTuple

import numpy as np

from common.quality.verdict import TRAINING
from common.space import geometry, io
from common.space.prealign import prealign

CT = -200.0  # Hounsfield units: below, as the 1st percentile, lies air, and no scaling of MR
BRAIN = (0.7, 2.2)  # litres of a person's brain with its fluid; a head with its skull has 3 or more
CROP = 64.0  # mm: the longest side of a scan cut out around a hippocampus
ALIKE = 0.3  # correlation of bright tissue: 0.39 to 0.81 of pairs of one contrast, at most 0.21 of two
GROWTH = 4.0  # of volume, by the alignment, beyond that of the foregrounds
SMALL = 100.0  # mm: a field of view for which 2 mm voxels are too coarse
WIDE = 270.0  # mm: one of a trunk, in CT, for which they are too fine: what is found is wrong, and dear
MIND = {"features": "mind"}


class Facts(NamedTuple):
    """What the rule asks of a pair; the first of two values is the moving scan's."""

    ct: tuple[bool, bool]  # air below 0, as in Hounsfield units
    stripped: tuple[bool, bool]  # background exactly 0
    litres: tuple[float, float]  # of the foreground
    side_mm: tuple[float, float]  # longest side of the field of view
    median: tuple[float, float]  # of the foreground, scaled to [0, 1]
    alike: float  # correlation of the bright tissue after a coarse alignment
    codes: tuple[int, ...] = ()  # of the label maps that are given
    lost: bool = False  # the affine alignment asks for a growth that the sizes of the foregrounds do not explain


class Choice(NamedTuple):
    """What is run, and why."""

    bundle: str
    options: dict[str, Any]
    reason: str
    config: str = ""  # one more config of the bundle, laid over its inference.json


def choose(pair: Facts) -> Choice:
    """The rule: from what the scans are to a bundle and its options; the first that fits is taken."""
    choice = _by_content(pair)
    if not pair.lost:
        return choice
    reason = f"{choice.reason}; an affine alignment would lose its way, as they show different parts: a rigid one"
    return choice._replace(options=choice.options | {"prealign": "rigid"}, reason=reason)


def _by_content(pair: Facts) -> Choice:
    steps = {"refine_steps": 50}
    small = {"spacing": 1.0} if max(pair.side_mm) < SMALL else {}
    if all(pair.ct):
        reason = "two CT scans: no weights here know CT; MIND on a fixed range of values"
        if pair.side_mm[1] > WIDE:
            small, reason = {"spacing": 3.0}, f"{reason}, and voxels of 3 mm for a field of {pair.side_mm[1]:.0f} mm"
        return Choice("samconvex", MIND | small | steps | {"intensity_range": [-1000, 1000]}, reason)
    if any(pair.ct) or pair.alike < ALIKE:
        kinds = "a CT and another scan" if any(pair.ct) else f"two contrasts: bright tissue correlates {pair.alike:.2f}"
        options = MIND | small | steps | {"refine_similarity": "mind"}
        return Choice("samconvex", options, f"{kinds}; MIND compares structure, not grey values")
    if all(pair.stripped) and all(BRAIN[0] < n < BRAIN[1] for n in pair.litres) and _like("brain_t1", pair):
        return Choice("samconvex", steps, "two brains in T1 without skull: what the weights were trained on")
    if max(pair.side_mm) <= CROP and not any(pair.stripped) and _like("hippocampus", pair) and _two_parts(pair.codes):
        reason = "two small scans as cut out around a hippocampus: the weights for these"
        return Choice("residual_aligner", steps, reason, config="hippocampus.json")
    what = "one contrast, but nothing that weights here were trained on"
    if any(n > BRAIN[1] for n in pair.litres) and all(pair.stripped):
        what = "a head with its skull (removing it, by HD-BET or SynthStrip, would help)"
    return Choice("samconvex", MIND | small | steps, f"{what}; MIND needs no training")


def _like(kind: str, pair: Facts) -> bool:
    low, high = TRAINING[kind].median
    return all(low <= middle <= high for middle in pair.median)


def _two_parts(codes: tuple[int, ...]) -> bool:
    """Whether label maps, if there are any, may be those of a hippocampus: front and back."""
    return set(codes) <= {0, 1, 2}


def facts_of(
    moving: str,
    fixed: str,
    labels: tuple[str, ...] = (),
    *,
    header: str = "",
    series: Any = "",
    mode: str = "affine",
) -> Facts:
    """Look at two scans; of several contrasts, at the first.

    Args:
        moving, fixed: what `io.read_scan` reads.
        labels: label maps that come with them.
        header, series: as of `io.read_scan`.
        mode: of `prealign`, by which they are brought together to compare their contrast.

    Raises:
        InputError: what the readers refuse.
    """
    scans = []
    for path in (moving, fixed):
        array, affine = io.read_scan(path, header=header, series=series)
        io.refuse_constant(array, path)
        scans.append((array[0], affine))
    codes = sorted({int(n) for path in labels for n in np.unique(io.read_label(path, header=header)[0])})
    each = [_look(*scan) for scan in scans]
    matrix = prealign(*scans[1], *scans[0], mode)
    growth = np.linalg.det(matrix[:3, :3]) * each[1][2] / max(each[0][2], 1e-9)  # beside that of the foregrounds
    lost = mode == "affine" and not 1 / GROWTH < growth < GROWTH
    if lost:
        matrix = prealign(*scans[1], *scans[0], "rigid")
    return Facts(*zip(*each), alike=_alike(*scans, matrix), codes=tuple(codes), lost=lost)


def _look(array: np.ndarray, affine: np.ndarray) -> tuple[bool, bool, float, float, float]:
    low, high = geometry.foreground_range(array)
    inside = array[array > low]
    voxel = np.linalg.norm(affine[:3, :3], axis=0)
    return (
        bool(np.percentile(array, 1) < CT),
        bool(geometry.is_stripped(array)),
        len(inside) * float(voxel.prod()) / 1e6,
        float((np.array(array.shape) * voxel).max()),
        float(np.clip((np.median(inside) - low) / (high - low), 0, 1)) if len(inside) else 0.0,
    )


def _alike(
    moving: tuple[np.ndarray, np.ndarray], fixed: tuple[np.ndarray, np.ndarray], matrix: np.ndarray
) -> float:
    """`tissue_correlation` of two scans on a coarse grid."""
    size = fixed[0].shape
    box = geometry.foreground_box(fixed[0])
    first, last = (np.zeros(3), np.array(size) - 1) if box is None else box
    side = float(((last - first + 1) * np.linalg.norm(fixed[1][:3, :3], axis=0)).max())
    grid, onto = geometry.working_grid(size, fixed[1], side / 80, box=box)
    moved, there = (
        geometry.to_working_grid(scan[0][None], scan[1], grid, onto, where)[0]
        for scan, where in ((moving, matrix), (fixed, None))
    )
    inside = (moved > geometry.foreground_floor(moving[0])) & (there > geometry.foreground_floor(fixed[0]))
    return tissue_correlation(moved, there, inside)


def tissue_correlation(moved: np.ndarray, there: np.ndarray, inside: np.ndarray) -> float:
    """Correlation of two aligned scans where both are above the darkest fifth of the voxels `inside`; 0 of too few.

    Fluid and background are dark in T1 and FLAIR alike, and would make them correlate; grey and white matter do not.
    Below ALIKE the scans are of two contrasts.
    """
    if inside.sum() < 100:
        return 0.0
    bright = inside & (moved > np.quantile(moved[inside], 0.2)) & (there > np.quantile(there[inside], 0.2))
    a, b = moved[bright], there[bright]
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 9 and a.std() > 0 and b.std() > 0 else 0.0
