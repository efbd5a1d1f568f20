"""Mirroring and rotation of pairs: where every voxel goes, scans and classes alike."""

import pytest
import torch
from monai.data import MetaTensor

from common.train import augment
from common.train.labels import UNKNOWN

SIZE = (7, 9, 8)


def pair(size: tuple[int, int, int] = SIZE) -> dict:
    """A packed pair whose values are the classes of its maps, so that either can be checked by the other."""
    classes = torch.randint(0, 4, (2, *size)).float()
    return {"id": "a_to_b", "image": MetaTensor(classes.clone()), "label": MetaTensor(classes.clone())}


def plain(data: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return data["image"].as_tensor(), data["label"].as_tensor()


def test_mirror_flips_everything_alike() -> None:
    before = pair()
    image, label = (x.clone() for x in plain(before))
    after = augment.MirrorPaird(1.0)(before)
    assert torch.equal(plain(before)[0], image), "what the dataset keeps was changed"
    assert torch.equal(plain(after)[0], image.flip(1, 2, 3)) and torch.equal(plain(after)[1], label.flip(1, 2, 3))


@pytest.mark.parametrize("axis", range(3))
def test_mirror_swaps_sides_along_the_first_axis_only(axis: int) -> None:
    prob = tuple(float(n == axis) for n in range(3))
    before = pair()
    image, label = plain(augment.MirrorPaird(prob, mirrored=[(1, 3)])(before))
    swap = torch.tensor([0.0, 3, 2, 1] if axis == 0 else [0.0, 1, 2, 3])
    assert torch.equal(image, plain(before)[0].flip(axis + 1))
    assert torch.equal(label, swap[plain(before)[1].long()].flip(axis + 1))


def test_unknown_sides_are_said(capsys: pytest.CaptureFixture) -> None:
    """Mirrored left to right without pairs of classes; not if there are none, or along the other axes."""
    for mirrored, prob in (([], 0.5), ([(1, 2)], 0.5), (None, (0, 0.5, 0.5))):
        augment.MirrorPaird(prob, mirrored=mirrored)
    assert not capsys.readouterr().out
    augment.MirrorPaird(0.5)
    assert "give --mirrored_classes" in capsys.readouterr().out


def test_mirror_probability() -> None:
    """About a quarter of the pairs is mirrored; without labels too."""
    before, transform = {"image": MetaTensor(torch.arange(16.0).view(2, 2, 2, 2))}, augment.MirrorPaird((0.25, 0, 0))
    turned = sum(bool((transform(before)["image"] != before["image"]).any()) for _ in range(400))
    assert 60 < turned < 140
    assert augment.MirrorPaird(0.0)(before)["image"] is before["image"]


def test_random_rotation() -> None:
    angles = []
    for seed in range(30):
        torch.manual_seed(seed)
        matrix = augment.random_rotation(25.0)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(3), rtol=0, atol=1e-5)
        assert float(torch.linalg.det(matrix)) == pytest.approx(1, abs=1e-5)
        angles.append(float(torch.rad2deg(((matrix.trace() - 1) / 2).clamp(-1, 1).acos())))
    assert 20 < max(angles) <= 25.01 and min(angles) < 5


@pytest.fixture
def quarter_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rotation is by 90 degrees about the first axis: out(i, j, k) = in(i, -k, j) about the centre."""
    turn = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    monkeypatch.setattr(augment, "random_rotation", lambda degrees: turn)


def test_quarter_turn_is_known(quarter_turn: None) -> None:
    """On a square grid nothing leaves it and nothing is interpolated: out[i, j, k] = in[i, n - 1 - k, j]."""
    before = pair((4, 6, 6))
    for got, value in zip(plain(augment.RotatePaird(90.0)(before)), plain(before)):
        torch.testing.assert_close(got, value.transpose(2, 3).flip(3), rtol=0, atol=1e-4)
        assert not torch.equal(value.transpose(2, 3).flip(3), value.transpose(2, 3).flip(2)), "the direction counts"


def test_outside_is_empty_and_unknown(quarter_turn: None) -> None:
    """On a longer axis the turned corners come from outside: scans 0, classes unknown; unknown classes stay so."""
    before = pair((2, 10, 4))
    before["image"] = before["image"] + 1
    before["label"][1] = UNKNOWN
    image, label = plain(augment.RotatePaird(90.0)(before))
    outside = torch.ones(2, 10, 4, dtype=torch.bool)
    outside[:, 3:7] = False
    assert (image[:, outside] == 0).all() and (image[:, ~outside] > 0.99).all()
    assert torch.equal(label[0] == UNKNOWN, outside) and (label[1] == UNKNOWN).all()


def test_rotation_turns_scan_and_classes_together() -> None:
    """A box and its label map: after the turn the box is where its class is; both scans turn alike."""
    box = torch.zeros(2, 20, 20, 20)
    box[:, 4:12, 6:16, 5:11] = 1
    data = {"image": MetaTensor(box.clone()), "label": MetaTensor(box.clone())}
    changes = []
    for _ in range(5):
        image, label = plain(augment.RotatePaird(25.0)(data))
        changes.append(float((image - box).abs().max()))
        assert torch.equal(image[0], image[1])
        sure = (image - 0.5).abs() > 0.45
        assert torch.equal((image > 0.5)[sure], (label == 1)[sure])
    assert max(changes) > 0.5, "nothing turned"
    assert augment.RotatePaird(0.0)(data)["image"] is data["image"]
    assert "label" not in augment.RotatePaird(25.0)({"image": data["image"]})


def test_deformation_moves_each_scan_with_its_classes() -> None:
    """A box and its label map: the box is where its class is, elsewhere in the moving than in the fixed scan."""
    box = torch.zeros(4, 20, 20, 20)  # two channels a scan
    box[:, 4:12, 6:16, 5:11] = 1
    data = {"image": MetaTensor(box.clone()), "label": MetaTensor(box[:2].clone())}
    image, label = plain(augment.DeformPaird(2.0, distance=8)(data))
    assert torch.equal(image[0], image[1]) and torch.equal(image[2], image[3])
    for n, scan in enumerate((image[0], image[2])):
        sure = (scan - 0.5).abs() > 0.49
        assert torch.equal((scan > 0.5)[sure], (label[n] == 1)[sure]) and (scan - box[0]).abs().max() > 0.5
    assert (image[0] - image[2]).abs().max() > 0.5
    assert augment.DeformPaird(0.0)(data)["image"] is data["image"]
    assert "label" not in augment.DeformPaird(2.0)({"image": data["image"]})


def test_deformation_is_as_large_as_asked_and_smooth() -> None:
    transform, every = augment.DeformPaird(1.5, distance=16), []
    for _ in range(20):
        disp = transform._displacement(torch.zeros(2, 33, 49, 17))
        assert disp.shape == (1, 3, 33, 49, 17) and disp.diff(dim=2).abs().max() < 1
        every.append(disp[:, :, ::16, ::16, ::16])  # at the control points
    assert float(torch.cat(every).std()) == pytest.approx(1.5, rel=0.05)


def test_rejects() -> None:
    with pytest.raises(ValueError, match=r"DeformPaird\(\) 'amplitude' must be >= 0, got -1"):
        augment.DeformPaird(-1)
    with pytest.raises(ValueError, match=r"DeformPaird\(\) 'distance' must be >= 1, got 0"):
        augment.DeformPaird(1.0, distance=0)
    with pytest.raises(ValueError, match=r"MirrorPaird\(\) 'prob' must be one or three numbers from 0 to 1, got 1.5"):
        augment.MirrorPaird(1.5)
    with pytest.raises(ValueError, match=r"'prob' must be one or three numbers"):
        augment.MirrorPaird((0.5, 0.5))
    with pytest.raises(ValueError, match=r"RotatePaird\(\) 'degrees' must be >= 0, got -1"):
        augment.RotatePaird(-1)


def test_a_scan_is_registered_with_itself_now_and_then() -> None:
    torch.manual_seed(0)
    pair = {"moving": torch.rand(1, 2, 2, 2), "fixed": torch.rand(1, 2, 2, 2), "moving_label": torch.ones(1, 2, 2, 2)}
    pair["fixed_label"] = 2 * pair["moving_label"]
    always, never = (augment.SamePersond(prob)(pair) for prob in (1.0, 0.0))
    assert always["fixed"] is pair["moving"] and always["fixed_label"] is pair["moving_label"]
    assert never["fixed"] is pair["fixed"] and never["fixed_label"] is pair["fixed_label"]
    often = sum(augment.SamePersond(0.3)(pair)["fixed"] is pair["moving"] for _ in range(400))
    assert 80 < often < 160
    with pytest.raises(ValueError, match="'prob' must be from 0 to 1, got 2"):
        augment.SamePersond(2)
