"""What picture and page show of a registration, computed once for both."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from common.quality.measure import Registration
from common.space import mapping

MARKS = 400  # landmarks that are drawn, at most


@dataclass
class Views:
    """Arrays (i, j, k) on the working grid of a pair; first channels."""

    pair: Registration

    def __post_init__(self) -> None:
        self.moving, self.fixed = (half[0].numpy() for half in self.pair.work.float().chunk(2))
        self.warped, self.determinant = self.pair.warped.numpy(), self.pair.determinant.float().numpy()
        self.top = max(float(self.fixed.max()), 1e-6)

    @cached_property
    def longest(self) -> float:
        """mm: 99th percentile of the displacement's length in the fixed foreground."""
        return float(np.percentile(self.pair.length[self.pair.inside.numpy()], 99)) or 1.0

    @cached_property
    def middle(self) -> list[int]:
        """Voxel in the middle of the fixed foreground."""
        inside = self.pair.inside.numpy()
        across = (inside.sum(tuple({0, 1, 2} - {axis})) for axis in range(3))
        return [int(round(float((np.arange(len(n)) * n).sum() / n.sum()))) for n in across]

    @property
    def mm(self) -> float:
        """Side of a voxel, in the mean."""
        return float(np.linalg.norm(self.pair.work_affine[:3, :3], axis=0).mean())

    @property
    def labelled(self) -> bool:
        return self.pair.fixed_label is not None and self.pair.moving_label is not None

    def labels(self, first: tuple[int, int, int], size: tuple[int, int, int], step: int = 1) -> tuple[np.ndarray, ...]:
        """Fixed and warped label map, nearest neighbours, on every `step`th voxel from `first` on: each of `size`."""
        pair, onto = self.pair, self.pair.work_affine @ np.diag([step, step, step, 1.0])
        onto[:3, 3] = (self.pair.work_affine @ [*first, 1])[:3]
        fixed = mapping.resample(pair.fixed_label, pair.fixed_affine, size, onto, nearest=True)
        some = (slice(None), *(slice(begin, begin + n * step, step) for begin, n in zip(first, size)))
        # `pair.whole`, whose displacement need not be interpolated on its own grid: half the time.
        moved = mapping.displacement_transform(pair.disp[some].numpy() / step, onto)
        whole = mapping.compose(moved, pair.start)
        return fixed, mapping.resample(pair.moving_label, pair.moving_affine, size, onto, whole, nearest=True)

    @cached_property
    def landmarks(self) -> list[dict]:
        """Name and places in voxels: of a fixed landmark, and where the moving one comes to lie (None: nowhere)."""
        pair = self.pair
        if pair.fixed_points is None or pair.moving_points is None:
            return []
        to_voxel = np.linalg.inv(pair.work_affine) @ np.diag([-1.0, -1, 1, 1])
        fixed = pair.fixed_points.lps[:MARKS]
        back = mapping.invert(pair.start)  # what T(x) misses y by, taken back through the alignment: to first order
        there = pair.moving_points.lps[:MARKS], mapping.map_points(pair.whole, fixed)
        wanted, came = (mapping.map_points(back, points) for points in there)
        places = [points @ to_voxel[:3, :3].T + to_voxel[:3, 3] for points in (fixed, fixed + wanted - came)]
        return [
            {"name": str(name), "fixed": a.tolist(), "warped": b.tolist() if np.isfinite(b).all() else None}
            for name, a, b in zip(pair.fixed_points.names, *places)
        ]
