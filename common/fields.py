"""Displacement fields: identity, composition, integration, inversion, resampling, Jacobian. All in voxels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.ops import warp


def identity(size: tuple[int, int, int], like: Tensor) -> Tensor:
    """Voxel coordinates (1, 3, I, J, K) of a grid, on the device of `like`, in at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    axes = [torch.arange(n, device=like.device, dtype=dtype) for n in size]
    return torch.stack(torch.meshgrid(axes, indexing="ij")).unsqueeze(0)


def compose(first: Tensor, then: Tensor, *, padding: str = "border", backend: str | None = None) -> Tensor:
    """Displacement whose warp equals warping by `first` and the result by `then`.

    compose(first, then)(x) = then(x) + first(x + then(x))

    Args:
        first, then: (B, 3, I, J, K) displacements in voxels of one grid.
        padding: value of `first` outside its grid: that of the nearest voxel ("border") or 0 ("zeros").
        backend: of `common.ops.warp`.

    Returns:
        (B, 3, I, J, K) displacement.
    """
    return then + warp(first, then, padding=padding, backend=backend)


def integrate(velocity: Tensor, *, steps: int = 7) -> Tensor:
    """Displacement of the flow of a stationary velocity after unit time, by scaling and squaring.

    disp_0 = velocity / 2^steps, then disp <- compose(disp, disp), `steps` times

    Args:
        velocity: (B, 3, I, J, K) in voxels per unit time.
        steps: number of squarings; 2^-steps times the largest velocity should be well below one voxel.

    Source: Arsigny et al., A log-Euclidean framework for statistics on diffeomorphisms, MICCAI 2006.
    """
    disp = velocity / 2**steps
    for _ in range(steps):
        disp = compose(disp, disp)
    return disp


def invert(disp: Tensor, *, iterations: int = 60, tolerance: float = 1e-3) -> Tensor:
    """Displacement v with compose(v, disp) = compose(disp, v) = 0, by a damped fixed point.

    r(x) = v(x) + disp(x + v(x)),  v <- v - step r,  step halved at each voxel where |r| would not fall

    Undamped (step 1) this is Chen's iteration, which needs a Lipschitz constant below 1; damped, it also goes on where
    the Jacobian I + D disp only has eigenvalues of positive real part. Where `disp` folds there is no inverse, and v is
    the nearest that was found: see `inverse_error`.

    Args:
        disp: (B, 3, I, J, K) in voxels.
        iterations: cap of the updates.
        tolerance: voxels; it ends when |r| is below this everywhere.

    Source: Chen et al., A simple fixed-point approach to invert a deformation field, Medical Physics 2008; the damping
        is ours.
    """
    inverse = torch.empty_like(disp)
    for field, found in zip(disp, inverse):  # (3, I, J, K) each
        points = identity(field.shape[1:], field)[0].flatten(1).to(field.dtype)
        found.copy_(_invert_at(field, points, iterations, tolerance).view_as(found))
    return inverse


def round_trip(disp: Tensor, points: Tensor, *, iterations: int = 60, tolerance: float = 1e-3) -> Tensor:
    """T^-1(T(x)) - x of T(x) = x + disp(x) at some points only: what `invert` would do there, without a whole inverse.

    Args:
        disp: (3, I, J, K) in voxels.
        points: x (3, N) in voxels.
        iterations, tolerance: of `invert`.

    Returns:
        (3, N) in voxels; 0 up to the tolerance where T is one-to-one, beyond half a voxel where it folds.
    """
    there = points + sample_at(disp, points)
    return there + _invert_at(disp, there, iterations, tolerance) - points


def _invert_at(field: Tensor, points: Tensor, iterations: int, tolerance: float) -> Tensor:
    """v (3, N) with v + field(points + v) = 0; only the points that are not there yet are worked on."""
    flat = -sample_at(field, points)
    rest = flat + sample_at(field, points + flat)
    size, step = rest.square().sum(0), torch.ones_like(rest[0])
    for _ in range(iterations):
        active = (size > tolerance**2).nonzero()[:, 0]
        if not len(active):
            break
        trial = flat[:, active] - step[active] * rest[:, active]
        new = trial + sample_at(field, points[:, active] + trial)
        new_size = new.square().sum(0)
        better = new_size < size[active]
        flat[:, active] = torch.where(better, trial, flat[:, active])
        rest[:, active] = torch.where(better, new, rest[:, active])
        size[active] = torch.where(better, new_size, size[active])
        step[active] = torch.where(better, (1.2 * step[active]).clamp(max=1), step[active] / 2)
    return flat


def sample_at(field: Tensor, points: Tensor) -> Tensor:
    """Values (3, N) of a displacement (3, I, J, K) at points (3, N) in voxels, the border repeated outside."""
    largest = torch.stack([points.new_full((1,), n - 1) for n in field.shape[1:]])  # made where they are: no copy
    unit = (2 * points / largest.clamp(min=1) - 1).flip(0).T  # grid_sample has the last axis first
    options = {"mode": "bilinear", "padding_mode": "border", "align_corners": True}
    return F.grid_sample(field[None], unit[None, :, None, None], **options)[0, :, :, 0, 0]


def inverse_error(disp: Tensor, inverse: Tensor) -> Tensor:
    """|compose(disp, inverse)| in voxels: (B, 1, I, J, K)."""
    return compose(disp, inverse).norm(dim=1, keepdim=True)


def resize_disp(disp: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Resample a displacement to another corner-aligned grid of the same field of view, and rescale its values.

    Args:
        disp: (B, 3, I, J, K) in voxels of its grid.
        size: new (I', J', K').

    Returns:
        (B, 3, I', J', K') in voxels of the new grid: component c times (size'_c - 1) / (size_c - 1).
    """
    resampled = F.interpolate(disp, size=tuple(size), mode="trilinear", align_corners=True)
    return _rescaled(resampled, disp)


@torch.jit.script_if_tracing  # a trace would keep the sizes that it has seen as constants
def _rescaled(resampled: Tensor, disp: Tensor) -> Tensor:
    scale = [(resampled.shape[axis] - 1) / max(disp.shape[axis] - 1, 1) for axis in (2, 3, 4)]
    return resampled * torch.tensor(scale, dtype=disp.dtype, device=disp.device).view(1, 3, 1, 1, 1)


def pool_disp(disp: Tensor, factor: int) -> Tensor:
    """Mean displacement of blocks of factor^3 voxels, in voxels of that coarser grid, whose faces are aligned.

    (B, 3, I, J, K) -> (B, 3, ceil(I / factor), ...): the grid of features that are averaged over such blocks.
    """
    return F.avg_pool3d(disp, factor, ceil_mode=True, count_include_pad=False) / factor


def unpool_disp(disp: Tensor, factor: int, size: tuple[int, int, int]) -> Tensor:
    """From a grid of blocks of factor^3 voxels onto the voxels, (B, 3, *size): linear between the blocks' middles.

    What reaches over the end of the scan is cut.
    """
    fine = F.interpolate(disp * factor, scale_factor=factor, mode="trilinear", align_corners=False)
    return fine[:, :, : size[0], : size[1], : size[2]]


def jacobian_determinant(disp: Tensor) -> Tensor:
    """Determinant of the Jacobian of x + disp(x) by central differences, one-sided at the border.

    Args:
        disp: (B, 3, I, J, K) in voxels, every axis of at least 2 voxels.

    Returns:
        (B, 1, I, J, K); 1 where the volume is kept, <= 0 where the field folds.

    Raises:
        ValueError: an axis of one voxel.
    """
    if min(disp.shape[2:]) < 2:
        raise ValueError(
            f"jacobian_determinant() 'disp' must have at least 2 voxels along each axis, got {tuple(disp.shape)}"
        )
    (ai, bi, ci), (aj, bj, cj), (ak, bk, ck) = (x.unbind(1) for x in torch.gradient(disp, dim=(2, 3, 4)))
    ai, bj, ck = ai + 1, bj + 1, ck + 1  # ai is d disp_a / d i, and so on
    det = ai * (bj * ck - bk * cj) - aj * (bi * ck - bk * ci) + ak * (bi * cj - bj * ci)
    return det.unsqueeze(1)


def unfold(disp: Tensor, *, iterations: int = 20, threshold: float = 0.05) -> Tensor:
    """Smooth a displacement locally, only where it folds, until it no longer does or `iterations` are spent.

    disp <- disp + m (box(disp) - disp),  m = box of the voxels within one voxel of det J <= threshold

    Args:
        disp: (B, 3, I, J, K) in voxels.
        iterations: cap of the rounds; one round reaches a few voxels.
        threshold: determinants up to this one count as folded.

    Returns:
        (B, 3, I, J, K); equal to `disp` further than a few voxels from its folds.
    """
    for _ in range(iterations):
        folded = (jacobian_determinant(disp) <= threshold).to(disp.dtype)
        if not bool(folded.any()):
            break
        near = F.max_pool3d(folded, 3, stride=1, padding=1)
        blend = F.avg_pool3d(F.pad(near, (1,) * 6, mode="replicate"), 3, stride=1)
        means = F.avg_pool3d(F.pad(disp, (1,) * 6, mode="replicate"), 3, stride=1)
        disp = disp + blend * (means - disp)
    return disp
