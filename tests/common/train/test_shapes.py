"""Made-up anatomy: label maps, the displacement that is known, contrasts, and the loss that uses them."""

import math

import pytest
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from common import InputError
from common.fields import identity
from common.ops import warp
from common.train import contrasts, shapes, synthesis
from common.train.synthesis import KnownFlowLoss, ShapePairs

ODD = (32, 37, 45)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def drawn() -> list[synthesis.ShapePair]:
    return [synthesis.draw_pair(seeded(seed), (40, 32, 36)) for seed in range(24)]


def agreement(pair: synthesis.ShapePair) -> float:
    """Share of the voxels whose label is that of moving(x + disp(x)), off the borders of labels and of the grid."""
    moving, fixed = pair.label[:, None, None].float()
    warped = warp(moving, pair.disp[None], mode="nearest")
    size = pair.label.shape[1:]
    there = identity(size, pair.disp) + pair.disp
    inside = ((there >= 0) & (there <= torch.tensor(size).view(1, 3, 1, 1, 1) - 1)).all(1, keepdim=True)
    certain = inside & ~synthesis.near_borders(fixed, 1)
    assert certain.float().mean() > 0.05
    return float((warped == fixed)[certain].float().mean())


# ---- label maps and motions -----------------------------------------------------------------------------------------


def test_truth_brings_labels_together(drawn: list[synthesis.ShapePair]) -> None:
    """In every family and with every kind of motion: without the displacement far fewer agree."""
    assert {pair.family for pair in drawn} == set(shapes.FAMILIES)
    assert min(map(agreement, drawn)) > 0.97
    still = [agreement(pair._replace(disp=torch.zeros_like(pair.disp))) for pair in drawn]
    assert sum(still) / len(still) < 0.95 and min(still) < 0.85
    lengths = [float(pair.disp.norm(dim=0).mean()) for pair in drawn]
    assert min(lengths) < 1.5 and 3 < max(lengths) < 15


def test_families_occur_as_often_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in shapes.FAMILIES:
        monkeypatch.setattr(shapes, f"_{family}", lambda g, size: (torch.zeros(size, dtype=torch.long), 1))
    found = [shapes.draw_anatomy(seeded(seed), (32, 32, 32)).family for seed in range(200)]
    for family, share in zip(shapes.FAMILIES, shapes.SHARES):
        assert found.count(family) / 200 == pytest.approx(share, abs=0.08)


def test_label_maps_are_rich() -> None:
    """Labels from 0 without gaps, one tissue each, a background of its own; layers share tissues among parcels."""
    maps = [shapes.draw_anatomy(seeded(seed), (32, 32, 32)) for seed in range(30)]
    for anatomy in maps:
        present = anatomy.label.unique()
        assert present.tolist() == list(range(len(anatomy.tissue)))
        assert anatomy.tissue.min() >= 0
        if anatomy.outside:
            assert (anatomy.tissue == anatomy.tissue[0]).sum() == 1, "the background is no tissue"
            assert (anatomy.label == 0).float().mean() < 0.9
    counts = [len(anatomy.tissue) for anatomy in maps]
    assert min(counts) >= 3 and max(counts) > 20 and sum(anatomy.outside for anatomy in maps) in range(12, 27)
    assert any(len(a.tissue.unique()) < len(a.tissue) for a in maps)


@pytest.mark.parametrize("scale", [2, 8, 32])
def test_noise_has_variance_one_and_its_scale(scale: int) -> None:
    values = torch.stack([shapes.noise(seeded(seed), 4, ODD, scale) for seed in range(100)])
    assert values.shape == (100, 4, *ODD)
    assert float(values.var(dim=(0, 1)).mean()) == pytest.approx(1, abs=0.06)
    step = values.diff(dim=2).square().mean().sqrt()  # of a normal field of that width, about 1.2 / scale
    assert 0.8 / scale < float(step) < 2 / scale


def test_motion_of_no_strength_is_none() -> None:
    motions = [shapes.draw_motion(seeded(seed), ODD, strength=0.0) for seed in range(10)]
    still = [motion for motion in motions if not motion.disp.any()]
    assert 0 < len(still) < 10, "half of them have an affine map"
    for motion in motions:  # the affine map alone: moving(x + disp(x)) is the anatomy at x
        here = identity(ODD, motion.disp)
        there = here + motion.disp
        inside = ((there >= 0) & (there <= torch.tensor(ODD).view(1, 3, 1, 1, 1) - 1)).all(1, keepdim=True)
        rest = (motion.disp + warp(motion.moving, motion.disp)).norm(dim=1, keepdim=True)
        assert float(rest[inside].max()) < 1e-3


# ---- pairs and images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32, 32), ODD, (64, 32, 48)])
def test_images_are_whole(size: tuple[int, int, int]) -> None:
    for seed in range(6):
        pair = synthesis.draw_pair(seeded(seed), size)
        assert pair.image.shape == pair.label.shape == (2, *size) and pair.disp.shape == (3, *size)
        assert torch.isfinite(pair.image).all() and torch.isfinite(pair.disp).all()
        assert pair.image.min() >= 0 and pair.image.max() <= 1
        assert all(image.std() > 0.01 for image in pair.image)


def test_same_seed_same_bits() -> None:
    """Whatever the process and the order; other indices and seeds give other pairs."""
    pairs = ShapePairs(10**9, (32, 32, 32), seed=3)
    first, far = pairs[0], pairs[10**9 - 1]
    torch.rand(5)
    again = ShapePairs(10, (32, 32, 32), seed=3)[0]
    assert all(torch.equal(torch.as_tensor(first[key]), torch.as_tensor(again[key])) for key in first)
    other = ShapePairs(10, (32, 32, 32), seed=4)[0]
    assert not torch.equal(first["disp"], far["disp"]) and not torch.equal(first["disp"], other["disp"])
    loader = DataLoader(ShapePairs(2, (32, 32, 32), seed=3), batch_size=2, num_workers=1)
    batch = next(iter(loader))
    assert torch.equal(batch["image"][0], first["image"])
    image, target = synthesis.prepare_shapes(batch, torch.device("cpu"))
    assert image.shape == (2, 2, 32, 32, 32)
    assert torch.equal(target, torch.cat([batch["label"], batch["disp"]], 1))


class Elsewhere(shapes.Draws):
    """Volumes without values: whoever would wait for one, as for those of a GPU, fails."""

    device = property(lambda self: torch.device("meta"))


def test_waits_for_nothing_but_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of anatomy, motion and corruption is drawn without a look at a volume, but one."""
    waits: list[int] = []
    monkeypatch.setattr(shapes, "_present", lambda codes: waits.append(1) or torch.tensor([0, 1, 3, 4, shapes.RIM]))
    families = set()
    for seed in range(12):
        pair = synthesis.draw_pair(Elsewhere(seed), (32, 36, 40))
        assert pair.image.shape == pair.label.shape == (2, 32, 36, 40) and pair.disp.shape == (3, 32, 36, 40)
        assert pair.image.is_meta and pair.label.is_meta and pair.disp.is_meta
        families.add(pair.family)
    assert len(waits) == 12 and families == set(shapes.FAMILIES)
    with pytest.raises(RuntimeError, match="meta"):
        float(pair.image.mean())


def test_foreground_is_scaled_alike_everywhere() -> None:
    """By the sort of a GPU as by the selection of a CPU."""

    class Gpu(Tensor):
        device = property(lambda self: torch.device("cuda"))

    for count in (0, 1, 2, 101, 200):
        image = torch.cat([torch.zeros(57), torch.rand(count)])[torch.randperm(57 + count)]
        sorted_out = contrasts.scale_foreground(image.as_subclass(Gpu)).as_subclass(Tensor)
        assert torch.equal(sorted_out, contrasts.scale_foreground(image))


@pytest.mark.gpu
def test_pair_on_gpu() -> None:
    pair, again = (ShapePairs(4, (32, 36, 40), seed=2, device="cuda")[1] for _ in range(2))
    assert pair["image"].is_cuda and all(torch.equal(pair[key], again[key]) for key in ("image", "label", "disp"))
    drawn = [synthesis.draw_pair(shapes.Draws(seed, "cuda"), (40, 32, 36)) for seed in range(6)]
    assert min(agreement(pair._replace(label=pair.label.cpu(), disp=pair.disp.cpu())) for pair in drawn) > 0.97


def test_contrasts_are_shared_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Label means of the two images of one map, without corruptions: equal if shared, else unrelated."""
    monkeypatch.setattr(contrasts, "chance", lambda generator, p: False)
    found = {True: [], False: []}
    for seed in range(12):
        anatomy = shapes.draw_anatomy(seeded(seed), (32, 32, 32))
        label = torch.stack([anatomy.label] * 2)
        for shared, values in found.items():
            image = contrasts.draw_images(seeded(100 + seed), anatomy, label, shared)
            means = torch.stack([image[:, anatomy.label == k].mean(1) for k in range(len(anatomy.tissue))], 1)
            values.append(float(torch.corrcoef(means)[0, 1]))
    assert min(found[True]) > 0.5 and sum(found[True]) / 12 > 0.8
    assert abs(sum(found[False]) / 12) < 0.4 and min(found[False]) < -0.2
    shares = [synthesis.draw_pair(seeded(n), (32, 32, 32), same_contrast=share).shared for n, share in ((0, 0), (0, 1))]
    assert shares == [False, True]


def test_corruptions_have_known_values() -> None:
    slices = contrasts.blur_matrix(6, 0.0, 2)  # means 0.5, 2.5, 4.5 of pairs, at those places, linear between
    expected = torch.tensor([0.5, 1, 2, 3, 4, 4.5])
    assert torch.allclose(slices @ torch.arange(6.0), expected)
    blur = contrasts.blur_matrix(31, 1.0, 1)
    assert torch.allclose(blur.sum(1), torch.ones(31))
    assert float(blur[15, 15] / blur[15, 16]) == pytest.approx(math.e**0.5)
    scaled = contrasts.scale_foreground(torch.cat([torch.zeros(50), torch.arange(1, 201.0)]))
    assert scaled[0] == 0 and float(scaled[50]) == pytest.approx(1 / 199) and (scaled[-2:] == 1).all()
    assert not contrasts.scale_foreground(torch.zeros(4)).any()
    table = torch.tensor([0.0, 1, 0.5])
    assert contrasts.broken(torch.tensor([0.0, 0.25, 0.5, 1]), table).tolist() == [0, 0.5, 1, 0.5]
    cuts = [contrasts.cut_view(seeded(seed), torch.ones(32, 32, 32)) for seed in range(20)]
    assert all(cut[4:28, 4:28, 4:28].all() for cut in cuts) and min(float(cut.mean()) for cut in cuts) < 0.8
    both = torch.zeros(6, 6, 6, dtype=torch.long)
    both[2:] = 1
    image = contrasts.paint(seeded(0), both, (torch.tensor([0.9, 0.5]), torch.zeros(2)), zero=True)
    assert not image[:2].any() and image[2:].min() > 0.2


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_loss_known_values() -> None:
    """Half of the grid is label 1; moving is shifted by 2 voxels along the first axis: 2 of 10 planes differ."""
    fixed = torch.zeros(1, 1, 10, 8, 8)
    fixed[:, :, 5:] = 1
    moving = torch.zeros_like(fixed)
    moving[:, :, 7:] = 1
    truth = torch.zeros(1, 3, 10, 8, 8)
    truth[:, 0] = 2
    target, nothing = torch.cat([moving, fixed, truth], 1), torch.zeros_like(truth)
    loss = KnownFlowLoss(smoothness=0.5)
    assert float(loss(nothing, target)) == pytest.approx(2 * 0.2 + 1.0 * 2)
    loss.progress = 0.2
    assert float(loss(nothing, target)) == pytest.approx(2 * 0.2 + 0.2 * 2)
    assert float(loss(truth, target)) == pytest.approx(0)
    assert float(KnownFlowLoss(labels=1)(nothing, target)) == pytest.approx(0.2 + 2)
    wrong = nothing.clone()
    wrong[:, 0, :2] = 2  # right far from the border of the labels, where the weight is a tenth
    weights = 0.1 * 2 + 1.0 * 6  # planes 0 and 1; 2 to 7; 8 and 9 leave the grid
    assert float(KnownFlowLoss.distance(wrong, truth, fixed)) == pytest.approx(2 * 6 / weights)


def test_loss_draws_labels_that_are_there() -> None:
    """Of 3 labels, 2 are drawn, each pair equally often; a map of one label has one; batches are means."""
    fixed = torch.zeros(1, 1, 8, 8, 12)
    fixed[..., 4:8], fixed[..., 8:] = 5, 63
    moving = fixed.roll(1, -1)  # each label is wrong in two of twelve planes
    nothing = torch.zeros(1, 3, 8, 8, 12)
    for labels, value in ((1, 2 / 12), (2, 4 / 12), (3, 6 / 12), (100, 6 / 12)):
        assert float(KnownFlowLoss(labels).overlap(nothing, moving, fixed)) == pytest.approx(value)
    both = (torch.cat([x, x]) for x in (nothing, moving, fixed))
    assert float(KnownFlowLoss().overlap(*both)) == pytest.approx(6 / 12)
    assert float(KnownFlowLoss().overlap(nothing, fixed * 0, fixed * 0)) == 0
    gone = torch.where(fixed == 5, 0, fixed)  # label 5 is not in the moving map: 4 planes; 0 has 4 too many
    seen = {round(12 * float(KnownFlowLoss(1).overlap(nothing, gone, fixed))) for _ in range(40)}
    assert seen == {0, 4}


def test_loss_falls_towards_the_truth(drawn: list[synthesis.ShapePair]) -> None:
    for pair in drawn[:6]:
        target = torch.cat([pair.label.float(), pair.disp])[None]
        values = [loss_at(share, pair.disp[None], target) for share in (0, 0.5, 1)]
        assert values[0] > 1.2 * values[1] and values[1] > 1.2 * values[2]
    disp = pair.disp[None].mul(0.5).requires_grad_()
    KnownFlowLoss()(disp, target).backward()
    assert torch.isfinite(disp.grad).all() and (disp.grad * pair.disp).sum() < 0, "downhill leads to the truth"


def loss_at(share: float, disp: Tensor, target: Tensor) -> float:
    torch.manual_seed(0)  # the labels drawn
    return float(KnownFlowLoss()(share * disp, target))


@pytest.mark.parametrize("options", [{"size": (31, 32, 32)}, {"size": (32, 32)}, {"size": 48}, {"same_contrast": 2}])
def test_rejects(options: dict) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(options))} must be"):
        ShapePairs(4, **options)
    with pytest.raises(ValueError, match=r"KnownFlowLoss\(\) 'labels' must be >= 1, got 0"):
        KnownFlowLoss(0)
