"""The SAM embedding, its two views and its contrastive loss: geometry, known values, and that training works."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.fields import identity
from samconvex import SAM, SAMConvex
from samconvex.contrast import ContrastiveLoss, Matches, TwoViews, sample
from samconvex.sam import GLOBAL, LOCAL, Embedder, Embedding


@pytest.fixture
def embedder() -> Embedder:
    return Embedder(widths=(8, 12, 16), embedding=16).eval()


@pytest.mark.parametrize("size", ((32, 32, 32), (37, 42, 35), (8, 9, 10)))
def test_strides_and_length(embedder: Embedder, size: tuple[int, int, int]) -> None:
    found = embedder(torch.rand(2, 1, *size))
    for part, stride in zip(found, (LOCAL, GLOBAL)):
        assert part.shape == (2, 16, *(-(-n // s) for n, s in zip(size, stride)))
        torch.testing.assert_close(part.norm(dim=1), torch.ones_like(part[:, 0]))


def test_depends_on_the_neighbourhood_only(embedder: Embedder) -> None:
    """Not on the rest of the batch nor on what lies far away, which normalisation over the volume would bring in."""
    scan = torch.rand(1, 1, 24, 24, 128)
    other = scan.clone()
    other[..., :16] = 0
    first, second = embedder(torch.cat([scan, other])), embedder(other)
    for both, alone in zip(first, second):
        torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(both[0, ..., -20:], both[1, ..., -20:], rtol=0, atol=1e-5)
        assert (both[0, ..., :8] - both[1, ..., :8]).abs().max() > 0.01


def test_features_of_the_levels() -> None:
    sam = SAM(embedding=16).eval()
    scan = torch.rand(1, 1, 24, 26, 28)
    fine, both = sam(scan, True), sam(scan, False)
    assert fine.shape == (1, 16, 12, 13, 14) and both.shape == (1, 32, 12, 13, 14)
    torch.testing.assert_close(both[:, :16], fine)
    torch.testing.assert_close(both[:, 16:].norm(dim=1), torch.ones(1, 12, 13, 14))


def test_weights_are_loaded_by_the_choice_of_features() -> None:
    assert not list(SAMConvex(features="mind").parameters())
    assert 1e6 < sum(p.numel() for p in SAMConvex(features="sam").parameters()) < 25e6 / 4
    with pytest.raises(ValueError, match="'features' must be 'sam', 'mind' or a module, got 'vgg'"):
        SAMConvex(features="vgg")


# ---- two views ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", (0, 1))
def test_matches_show_the_same_place(level: int) -> None:
    """Scans whose value is the coordinate: both views must read the same at the places that match."""
    size = (60, 64, 68)
    ramps = [identity(size, torch.zeros(1))[:, a : a + 1] / 68 for a in range(3)]
    views = TwoViews((16,) * (level + 1), gamma=0.0, noise=0.0, blur=0.0)
    for axis, ramp in enumerate(ramps):
        for attempt in range(20):  # until the level asked for is drawn
            torch.manual_seed(100 * attempt + 7)
            image, matches = views({"image": torch.cat([ramp, ramp.flip(axis + 2) + 0.01])}, torch.device("cpu"))
            torch.manual_seed(100 * attempt + 7)
            if int(torch.randint(level + 1, ())) == level:
                break
        else:
            pytest.fail("the level was never drawn")
        assert image.shape == (4, 1, 16, 16, 16) and matches.first.shape == (2, 128, 3)
        assert (matches.first - matches.second).norm(dim=-1).mean() > 1, "the two views must differ"
        for side, at in zip(image.chunk(2), matches):
            assert (at >= 0).all() and (at <= 15).all() and len(side) == 2
        for b in range(2):
            read = []
            for side, at in zip(image.chunk(2), matches):
                grid = (2 * at[b].flip(-1) / 15 - 1).view(1, -1, 1, 1, 3)
                read.append(F.grid_sample(side[b : b + 1], grid, align_corners=True).flatten())
            # not every place: the rim of the scan is mixed with the background around it
            assert (read[0] - read[1]).abs().median() < 1e-4, "a voxel is 0.015"


def test_views_of_an_empty_scan() -> None:
    image, matches = TwoViews((16,), points=8)({"image": torch.zeros(1, 1, 20, 20, 20)}, torch.device("cpu"))
    assert torch.isfinite(image).all() and torch.isfinite(torch.cat(matches)).all()


def test_views_differ_and_repeat_with_the_seed() -> None:
    scans = {"image": torch.rand(1, 1, 32, 32, 32)}
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(TwoViews((16,))(scans, torch.device("cpu"))[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    with pytest.raises(ValueError, match="'sizes' must be one number >= 8 a level, got"):
        TwoViews((4,))


# ---- loss -----------------------------------------------------------------------------------------------------------


def embedding_of(fine: torch.Tensor, coarse: torch.Tensor) -> Embedding:
    return Embedding(F.normalize(fine, dim=1), F.normalize(coarse, dim=1))


def middle(points: int = 5) -> Matches:
    at = torch.full((1, points, 3), 16.0)
    return Matches(at, at)


def test_loss_of_equal_vectors() -> None:
    """Nothing told apart: log of the number of candidates."""
    same = embedding_of(torch.ones(2, 4, 16, 16, 16), torch.ones(2, 4, 4, 4, 16))
    loss = ContrastiveLoss(hard=10, diverse=7)(same, middle())
    assert float(loss) == pytest.approx(math.log(1 + 10 + 10 + 7), rel=1e-5)


def test_loss_of_vectors_told_apart() -> None:
    """One vector at the place and its neighbourhood, the opposite one elsewhere: the hard negatives are opposite."""

    def ball(stride: tuple[int, int, int], radius: float) -> torch.Tensor:
        size = tuple(32 // s for s in stride)
        voxels = identity(size, torch.zeros(1)) * torch.tensor(stride).view(1, 3, 1, 1, 1)
        away = (voxels - 16).norm(dim=1, keepdim=True)
        return torch.where(away < radius, 1.0, -1.0).expand(2, 2, -1, -1, -1)

    loss = ContrastiveLoss(1.0, hard=10, diverse=0, distance=(4.0, 12.0))
    told = loss(embedding_of(ball(LOCAL, 4.0), ball(GLOBAL, 12.0)), middle())
    assert float(told) == pytest.approx(math.log(1 + 20 * math.exp(-2)), rel=1e-5)
    # negatives inside the distance are not taken, those just outside are
    wide = loss(embedding_of(ball(LOCAL, 8.0), ball(GLOBAL, 18.0)), middle())
    assert float(wide) > float(told) + 0.5


def test_loss_has_gradients_to_both_heads() -> None:
    parts = [torch.randn(4, 8, 12, 12, 12, requires_grad=True), torch.randn(4, 8, 3, 3, 12, requires_grad=True)]
    at = torch.rand(2, 6, 3) * 23
    ContrastiveLoss(hard=5, diverse=5)(embedding_of(*parts), Matches(at, at.flip(1))).backward()
    for part in parts:
        assert torch.isfinite(part.grad).all() and part.grad.abs().max() > 0


def test_sample_reads_between_voxels() -> None:
    maps = torch.zeros(1, 2, 4, 4, 4)
    maps[:, 0] = torch.arange(4.0).view(4, 1, 1)
    maps[:, 1] = 1.0
    found = sample(maps, torch.tensor([[[3.0, 0.0, 6.0]]]), (2, 2, 2))
    torch.testing.assert_close(found, F.normalize(torch.tensor([[[1.5, 1.0]]]), dim=-1))


def test_a_few_steps_learn_places() -> None:
    """After some steps on one scan, a place is found in the other view among all others more often."""
    torch.manual_seed(3)
    scan = {"image": F.interpolate(torch.rand(1, 1, 10, 10, 10), size=(40, 40, 40), mode="trilinear")}
    views = TwoViews((32,), points=48, rotation=10.0, gamma=0.0, noise=0.0, shift=0.1)
    loss_of = ContrastiveLoss(0.2, hard=16, diverse=32)
    net = Embedder(widths=(16, 16, 16), embedding=16)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def loss_at(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        image, matches = views(scan, torch.device("cpu"))
        return loss_of(net(image), matches)

    before = float(loss_at(77))
    for step in range(40):
        optimizer.zero_grad()
        loss_at(step).backward()
        optimizer.step()
    assert float(loss_at(77)) < before - 0.5


def test_the_place_itself_is_no_negative() -> None:
    """In a view too small for so many hard negatives, the vectors of the same place that fill up do not count."""
    maps = F.normalize(torch.randn(2, 4, 3, 3, 3), dim=1)
    at = torch.zeros(1, 1, 3)
    few, many = (
        ContrastiveLoss(hard=hard, diverse=0, distance=(2.5, 2.5))._head(maps, maps, (1, 1, 1), 2.5, Matches(at, at))
        for hard in (27, 1000)
    )
    near = (identity((3, 3, 3), like=maps)[0].flatten(1).norm(dim=0) < 2.5).sum()
    assert 0 < near < 27
    exact = ContrastiveLoss(hard=27 - int(near), diverse=0)._head(maps, maps, (1, 1, 1), 2.5, Matches(at, at))
    torch.testing.assert_close(few, exact)
    torch.testing.assert_close(many, exact)
