"""Instance optimisation finds a known displacement, keeps the better result and respects its arguments."""

import pytest
import torch

from common import RegistrationWarning
from common.fields import identity, jacobian_determinant, sample_at
from common.losses import diffusion, lncc
from common.ops import warp
from common.refine import Guide, _drawn, refine, smooth


def blobs(size: int = 32) -> torch.Tensor:
    coords = identity((size,) * 3, torch.zeros(1))
    wave = torch.sin(coords / 2.3).prod(1, keepdim=True) + torch.sin(coords / 3.9 + 1).prod(1, keepdim=True)
    return (wave - wave.min()) / (wave.max() - wave.min())


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    coords = identity((32,) * 3, torch.zeros(1))
    disp = 1.5 * torch.sin(coords.flip(1) / 6)
    moving = blobs()
    return torch.cat([moving, warp(moving, disp)], dim=1), disp


def test_finds_a_known_displacement() -> None:
    image, truth = pair()
    found = refine(torch.zeros_like(truth), image, 60, progress=False, smoothness=0.1)
    inner = (slice(None), slice(None), *[slice(4, -4)] * 3)
    before, after = (float((truth - d).norm(dim=1)[inner[1:]].mean()) for d in (torch.zeros_like(truth), found))
    moving, fixed = image.chunk(2, dim=1)
    assert after < 0.5 * before
    assert lncc(warp(moving, found), fixed, window=5) < lncc(moving, fixed, window=5) - 0.1
    assert float((jacobian_determinant(found) <= 0).float().mean()) < 0.005


def test_zero_steps_and_rejects() -> None:
    image, truth = pair()
    assert refine(truth, image, 0) is truth
    with pytest.raises(ValueError, match="'steps' must be >= 0, got -1"):
        refine(truth, image, -1)


@pytest.mark.parametrize("similarity", ("lncc", "mind"))
def test_diffeomorphic(similarity: str) -> None:
    """As near to the truth as without, from a start that folds, and nowhere folded."""
    image, truth = pair()
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    start = 0.5 * truth + noise
    assert (jacobian_determinant(start) <= 0).float().mean() > 0.1
    options = {"similarity": similarity, "progress": False, "smoothness": 0.1}
    free, found = (refine(start, image, 40, diffeomorphic=flow, **options) for flow in (False, True))
    errors = [float((truth - d).norm(dim=1)[..., 4:-4, 4:-4, 4:-4].mean()) for d in (0.5 * truth, free, found)]
    assert jacobian_determinant(found).min() > 0
    assert errors[2] < 0.75 * errors[0] and errors[2] < 1.15 * errors[1]
    projected = refine(start, image, 0, diffeomorphic=True)
    assert jacobian_determinant(projected).min() > 0 and not torch.equal(projected, start)


def test_never_worse_than_the_start() -> None:
    image, truth = pair()
    kept = refine(truth, image, 2, learning_rate=50.0, progress=False)
    assert torch.equal(kept, truth)


def test_a_rough_start_ends_as_a_smooth_one() -> None:
    """Noise from voxel to voxel, which a smooth update cannot take back."""
    image, truth = pair()
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    starts = truth / 2, truth / 2 + noise
    smooth_start, rough_start = (refine(start, image, 20, progress=False) for start in starts)
    assert diffusion(rough_start) < 1.2 * diffusion(smooth_start)
    assert (rough_start - smooth_start).norm(dim=1).mean() < 0.1
    kept = refine(starts[1], image, 20, start_means=0, progress=False)
    assert diffusion(kept) > 2 * diffusion(smooth_start)
    by_mind = refine(starts[1], image, 20, similarity="mind", progress=False)
    assert diffusion(by_mind) < 0.2 * diffusion(starts[1])


def test_works_under_no_grad_and_repeats_itself() -> None:
    image, truth = pair()
    with torch.no_grad():
        first, second = (refine(torch.zeros_like(truth), image, 4, progress=False) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad


def test_smooth_keeps_constants() -> None:
    constant = torch.full((1, 3, 6, 7, 8), 2.0)
    torch.testing.assert_close(smooth(constant), constant)


def error(found: torch.Tensor, truth: torch.Tensor, part: tuple = (slice(6, -6),) * 3) -> float:
    return float((truth - found).norm(dim=1)[(slice(None), *part)].mean())


@pytest.mark.parametrize("similarity", ("mind", "features"))
def test_features_find_it_in_other_contrast(similarity: str) -> None:
    """The fixed scan inverted: MIND does not see that, nor do features that forget the sign."""
    image, truth = pair()
    moving, fixed = image.chunk(2, dim=1)
    image = torch.cat([moving, 1 - fixed], dim=1)
    features = {"mind": None, "features": lambda scan: 4 * (scan - 0.5).square()}[similarity]
    start = torch.zeros_like(truth)
    options = {"similarity": similarity, "features": features, "smoothness": 0.02, "progress": False}
    found = refine(start, image, 60, **options)
    assert error(found, truth) < 0.6 * error(start, truth)


def test_features_may_live_on_a_coarser_grid() -> None:
    image, truth = pair()
    found = refine(
        torch.zeros_like(truth),
        image,
        30,
        similarity="features",
        features=lambda scan: torch.nn.functional.interpolate(
            scan, size=(16, 16, 16), mode="trilinear", align_corners=True
        ),
        smoothness=0.01,
        progress=False,
    )
    assert found.shape == truth.shape and error(found, truth) < 0.7 * error(torch.zeros_like(truth), truth)


def test_mask_leaves_a_lesion_out() -> None:
    """A texture that only the moving scan has drags the field; with its voxels masked it does not."""
    image, truth = pair()
    place = (slice(10, 20),) * 3
    image[0, 0][place] = torch.rand(10, 10, 10)
    mask = torch.ones(1, 2, 32, 32, 32)
    mask[0, 0][place] = 0
    start = torch.zeros_like(truth)
    with_mask, without = (refine(start, image, 60, mask=m, progress=False, smoothness=0.1) for m in (mask, None))
    assert error(with_mask, truth, place) < 0.8 * error(without, truth, place)


def test_empty_mask_is_ignored_with_a_warning() -> None:
    image, truth = pair()
    start = torch.zeros_like(truth)
    with pytest.warns(RegistrationWarning, match="the masks leave no voxel to compare"):
        found = refine(start, image, 3, mask=torch.zeros(1, 2, 32, 32, 32), progress=False)
    assert torch.equal(found, refine(start, image, 3, progress=False))


@pytest.mark.parametrize("similarity", ("lncc", "mind"))
def test_constant_scans_stay_finite(similarity: str) -> None:
    found = refine(
        torch.zeros(1, 3, 12, 12, 12), torch.ones(1, 2, 12, 12, 12), 3, similarity=similarity, progress=False
    )
    assert found.abs().max() < 1e-3


def test_rejects_contradictions() -> None:
    image, truth = pair()
    for options in ({"similarity": "mi"}, {"similarity": "features"}, {"features": torch.abs}):
        with pytest.raises(ValueError, match="'similarity' must be one of lncc, mind, features"):
            refine(truth, image, 1, **options)
    with pytest.raises(ValueError, match="'mask' must have shape .1, 2, 32, 32, 32., moving then fixed, got"):
        refine(truth, image, 1, mask=torch.ones(1, 1, 32, 32, 32))


def test_mask_too_small_for_the_grid_of_the_features() -> None:
    """One voxel that the coarser grid steps over: nothing to compare there, and no NaN."""
    image, truth = pair()
    mask = torch.zeros(1, 2, 32, 32, 32)
    mask[:, :, 15, 16, 15] = 1
    mask[:, 0] = 1
    found = refine(torch.zeros_like(truth), image, 3, similarity="mind", mask=mask, progress=False)
    assert torch.isfinite(found).all()


def test_mind_keeps_the_scale() -> None:
    """A long shift stays what it is: the grid of the averaged features has aligned faces, not corners."""
    scan = torch.nn.functional.interpolate(torch.rand(1, 1, 14, 9, 9), size=(48, 32, 32), mode="trilinear")
    truth = torch.zeros(1, 3, 48, 32, 32)
    truth[:, 0] = 10.0
    image = torch.cat([scan, warp(scan, truth)], 1)
    found = refine(truth, image, 20, similarity="mind", smoothness=1.0, progress=False)
    assert (found - truth)[0, 0, 8:28, 6:-6, 6:-6].mean().abs() < 0.05


def breathing(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A lung-like pair: fine vessels that all look alike in a body, 6 voxels of breathing, 80 pairs of points."""
    torch.manual_seed(2)
    at = torch.stack(torch.meshgrid(*[torch.arange(float(size))] * 3, indexing="ij")) - (size - 1) / 2
    vessels = 6 * torch.nn.functional.avg_pool3d((torch.rand(1, 1, *[size] * 3) > 0.97) * 1.0, 3, stride=1, padding=1)
    lung = (at.square().sum(0) < (0.36 * size) ** 2).float()[None, None]
    moving = lung * (0.15 + vessels / 2).clamp(0, 1) + 0.6 * (1 - lung)
    disp = torch.zeros(1, 3, *[size] * 3)
    disp[0, 2] = 6 * torch.cos(3.14159 * at[2] / size) * torch.exp(-(at[0] ** 2 + at[1] ** 2) / (0.4 * size) ** 2)
    disp[0, 1] = 2 * torch.cos(3.14159 * at[2] / size)
    fixed = warp(moving, disp)
    inside = (warp(lung, disp)[0, 0] > 0.9).nonzero().float()
    points = inside[torch.randperm(len(inside))[:80]]
    return torch.cat([moving, fixed], 1), disp, points, points + sample_at(disp[0], points.T).T


@pytest.mark.parametrize("similarity, share", [("lncc", 0.3), ("mind", 0.7)])
def test_points_guide(similarity: str, share: float) -> None:
    """40 pairs bring 40 others together, better than the scans alone; one pair that is wrong does not spoil that."""
    image, disp, points, there = breathing(40)
    wrong = there[:40].clone()
    wrong[7] += torch.tensor([9.0, 0, 0])

    def apart(guide: Guide | None) -> float:
        found = refine(torch.zeros_like(disp), image, 15, similarity=similarity, guide=guide, progress=False)
        assert float(jacobian_determinant(found).min()) > 0
        return float((points + sample_at(found[0], points.T).T - there)[40:].norm(dim=1).mean())

    alone = apart(None)
    guided, spoilt = (apart(Guide(points[:40], goal, 1.5 * torch.eye(3), 0.1)) for goal in (there[:40], wrong))
    assert guided < 0.5 and guided < share * alone and spoilt < 0.8 * alone


def test_scattered_points_leave_the_start_alone() -> None:
    """Points that say nothing about each other, as middles of folds of two people's cortex, must not spoil the rest."""
    image, disp, points, there = breathing(40)
    scattered = there[:40] + 4 * torch.randn(40, 3)
    start = disp * 0.7

    def apart(found: torch.Tensor) -> float:
        return float((points + sample_at(found[0], points.T).T - there)[40:].norm(dim=1).mean())

    guide = Guide(points[:40], scattered, 1.5 * torch.eye(3), 0.1)
    assert torch.equal(_drawn(guide, start, 0.5), start)
    drawn = _drawn(guide._replace(moving=there[:40]), start, 0.5)
    assert apart(drawn) < 0.5 * apart(start), "but those that agree draw"
    assert apart(refine(start, image, 15, guide=guide, progress=False)) < 1.5 * apart(start), "4 times, if they drew"
    few = guide._replace(fixed=points[:3], moving=there[:3])
    assert torch.equal(_drawn(few, start, 0.5), start), "of three, one half cannot say"
