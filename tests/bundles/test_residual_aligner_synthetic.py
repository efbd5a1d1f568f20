"""The known displacements of RAN's first training stage."""

import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from torch import Tensor

from common.fields import jacobian_determinant
from common.losses import RegistrationLoss, diffusion
from common.ops import warp
from common.run.transforms import PackPaird
from residual_aligner import BothDirections, synthetic
from residual_aligner.network import Registration

SIZE = (24, 30, 20)


def test_smooth_part_is_real() -> None:
    """As long as drawn, not near zero as in the released recipe; smooth, and hardly folded."""
    lengths = []
    for seed in range(12):
        torch.manual_seed(seed)
        disp = synthetic.smooth_displacement(SIZE, amplitude=12.0)
        assert disp.shape == (1, 3, *SIZE)
        lengths.append(float(disp.norm(dim=1).max()))
        assert disp.diff(dim=2).abs().max() < lengths[-1] / 4, "neighbours differ by little"
        assert (jacobian_determinant(disp) <= 0).double().mean() < 0.01
    assert max(lengths) > 6 and min(lengths) < 4 and max(lengths) <= 12
    assert synthetic.smooth_displacement(SIZE, amplitude=0.0).abs().max() == 0


def test_smooth_part_follows_its_width() -> None:
    """Wider Gaussians give smaller steps a length."""
    steps = []
    for width in (3.0, 10.0):
        torch.manual_seed(3)
        disp = synthetic.smooth_displacement((40, 40, 40), amplitude=2.0, sigma=(width, width + 1e-3))
        steps.append(float(disp.diff(dim=2).abs().max() / disp.norm(dim=1).max()))
    assert steps[1] < 0.6 * steps[0]


def test_rigid_matrix() -> None:
    """A rotation by the drawn angle, at most the largest one."""
    angles = []
    for seed in range(30):
        torch.manual_seed(seed)
        matrix, shift = synthetic.rigid_matrix(45.0, 8.0)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(3), rtol=0, atol=1e-5)
        assert float(torch.linalg.det(matrix)) == pytest.approx(1, abs=1e-5)
        angles.append(float(torch.rad2deg(((matrix.trace() - 1) / 2).clamp(-1, 1).acos())))
        assert shift.abs().max() <= 8
    assert 35 < max(angles) <= 45.01 and min(angles) < 10


def test_rigid_displacement_keeps_distances() -> None:
    """Without the smooth part: x + disp(x) is a rigid motion about the centre of the grid."""
    disp = synthetic.synthetic_displacement(SIZE, rotation=45.0, translation=0.0, amplitude=0.0)
    grid = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in SIZE], indexing="ij"))
    before, after = (x.flatten(1).T[::97] for x in (grid, grid + disp[0]))
    distances = [torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") for x in (before, after)]
    torch.testing.assert_close(distances[1], distances[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(after.mean(0) - before.mean(0), disp[0].flatten(1)[:, ::97].mean(1))
    torch.testing.assert_close(disp.mean((0, 2, 3, 4)), torch.zeros(3), rtol=0, atol=1e-4)
    assert disp.abs().max() > 1


def test_nothing_asked_for_is_nothing() -> None:
    disp = synthetic.synthetic_displacement(SIZE, rotation=0.0, translation=0.0, amplitude=0.0)
    torch.testing.assert_close(disp, torch.zeros(1, 3, *SIZE), rtol=0, atol=1e-5)


def scan(seed: int) -> MetaTensor:
    torch.manual_seed(seed)
    image: Tensor = torch.nn.functional.interpolate(torch.rand(1, 1, 5, 5, 5), SIZE, mode="trilinear")[0]
    return MetaTensor(image, affine=torch.eye(4), meta={"filename_or_obj": f"{seed}.nii.gz"})


def test_synthetic_pair() -> None:
    """The fixed scan is the moving one, displaced by what the network should find; the other scan has no part in it."""
    displaced = synthetic.SyntheticPaird(rotation=20.0, translation=2.0, amplitude=4.0)
    make = Compose([displaced, PackPaird("moving", "fixed")])
    moving = scan(1)
    pair = make({"id": "a_to_b", "moving": moving, "fixed": scan(2), "moving_label": moving, "fixed_label": moving})
    assert (
        set(pair) == {"id", "image", "disp"} and pair["image"].shape == (2, *SIZE) and pair["disp"].shape == (3, *SIZE)
    )
    torch.testing.assert_close(pair["image"][0].as_tensor(), moving[0].as_tensor())
    again = warp(moving.as_tensor()[None], pair["disp"][None], padding="zeros")[0]
    torch.testing.assert_close(pair["image"][1:].as_tensor(), again)
    assert (pair["image"][0] - pair["image"][1]).abs().max() > 0.1
    batch = {"image": pair["image"][None], "disp": pair["disp"][None]}
    image, target, *_ = synthetic.prepare_synthetic(batch, torch.device("cpu"))
    assert type(image) is Tensor and torch.equal(target[:, :3], batch["disp"]) and (target[:, 3] == 1).all()


def test_synthetic_loss() -> None:
    """Squared error where either scan has something, and the smoothness everywhere; of the fixed grid alone."""
    disp, image = torch.rand(1, 3, *SIZE), torch.zeros(1, 2, *SIZE)
    image[:, 0, :5], image[:, 1, 3:9] = 1, 1
    image, target, arguments, _ = synthetic.prepare_synthetic({"image": image, "disp": disp}, torch.device("cpu"))
    assert arguments == (target,)
    loss_of = synthetic.SyntheticLoss(0.1)

    def loss(found: Tensor, target: Tensor) -> Tensor:
        return loss_of(Registration(found, torch.rand(1, 3, *SIZE), []), image, target)

    torch.testing.assert_close(loss(disp, target), 0.1 * diffusion(disp))
    torch.testing.assert_close(loss(disp + 2, target), 4 + 0.1 * diffusion(disp))
    elsewhere = disp.clone()
    elsewhere[:, :, 9:] = 0
    torch.testing.assert_close(loss(elsewhere, target), 0.1 * diffusion(elsewhere))
    assert loss(elsewhere, torch.cat([disp, torch.ones(1, 1, *SIZE)], 1)) > 0.2
    empty = torch.cat([disp, torch.zeros(1, 1, *SIZE)], 1)
    torch.testing.assert_close(loss(disp + 2, empty), 0.1 * diffusion(disp))


def test_both_directions() -> None:
    """The mean of both, and what one leads to the other does not lead back from."""
    torch.manual_seed(0)
    image, shift = torch.rand(1, 2, *SIZE), torch.zeros(1, 3, *SIZE)
    shift[:, 0], field = 0.5, torch.rand(1, 3, *SIZE)
    one = RegistrationLoss(window=5, smoothness=0.3)
    expected = (one(field, image) + one(shift, image.flip(1))) / 2
    torch.testing.assert_close(BothDirections(one)(Registration(field, shift, []), image), expected)
    there_and_back = Registration(shift, -shift, [])
    loss = BothDirections(one, consistency=6.0)
    torch.testing.assert_close(loss(there_and_back, image), BothDirections(one)(there_and_back, image))
    twice = Registration(shift, shift, [])  # a voxel away after both: 1 / 3 a component
    torch.testing.assert_close(loss(twice, image), BothDirections(one)(twice, image) + 2)


def test_same_seed_same_pair() -> None:
    draws = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        draws.append(synthetic.synthetic_displacement(SIZE))
    assert torch.equal(draws[0], draws[1]) and (draws[0] - draws[2]).abs().mean() > 0.5
