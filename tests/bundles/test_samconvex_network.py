"""SAMConvex against the golden arrays of the authors' and ConvexAdam's code, and on cases with known answers."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor, nn

from common import InputError, RegistrationWarning
from common.fields import identity, resize_disp
from common.mind import box_mean, mind_features, mind_ssc
from common.ops import cost_volume, warp
from common.run.engines import RegistrationInferer
from samconvex import MIND, SAMConvex, convex
from samconvex.convex import THETAS, coupled_convex, inverse_consistent

TWICE = tuple(2 * theta for theta in THETAS)  # the authors' cost is half of the squared differences


def golden(development_data: Path, name: str) -> dict[str, Tensor]:
    path = development_data / "golden" / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"golden arrays not found: {path}")
    with np.load(path) as arrays:
        kinds = {key: arrays[key] for key in arrays.files if arrays[key].dtype.kind == "f"}
    return {key: torch.from_numpy(value).float() for key, value in kinds.items()}


def smooth_scan(size: tuple[int, int, int], seed: int = 0) -> Tensor:
    noise = torch.rand(1, 1, *[n // 3 + 2 for n in size], generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=size, mode="trilinear", align_corners=True)


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("radius", "name"), ((2, "sam_stages_n2"), (3, "sam_result_n3")))
def test_golden_coupled_convex(radius: int, name: str, development_data: Path) -> None:
    g = golden(development_data, "convex_parts")
    moving, fixed = g["feat_moving"][None], g["feat_fixed"][None]
    cost = cost_volume(fixed, moving, radius, similarity="ssd")
    step = 2 / (torch.tensor(fixed.shape[2:]) - 1.0)
    disp = coupled_convex(cost, radius, thetas=TWICE, step=step, smoothing=3)[0] * step.view(3, 1, 1, 1)
    expected = g[name] if g[name].ndim == 4 else g[name][-1]
    torch.testing.assert_close(disp, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("radius", "name"), ((2, "cvx_stages_hw2"), (4, "cvx_result_hw4")))
def test_golden_convexadam(radius: int, name: str, development_data: Path) -> None:
    g = golden(development_data, "convex_parts")
    cost = cost_volume(g["feat_fixed"][None], g["feat_moving"][None], radius, similarity="ssd", padding="zeros")
    cost = box_mean(cost, times=2)
    if radius == 2:
        torch.testing.assert_close(cost[0, 62], g["cvx_ssd_hw2_center"], rtol=0, atol=2e-6)
    expected = g[name] if g[name].ndim == 4 else g[name][-1]
    torch.testing.assert_close(coupled_convex(cost, radius, smoothing=1)[0], expected, rtol=0, atol=1e-6)


def test_golden_convexadam_on_scans(development_data: Path) -> None:
    """Features, cost and coupled convex of its default setting, before the inverses are made consistent."""
    g = golden(development_data, "convexadam_64x72x80")
    net = SAMConvex(features=MIND(stride=4), radii=(3,), padding="zeros", cost_smoothing=2)
    feats = [net.features(g[name][None, None], True) for name in ("fixed", "moving")]
    for name, (a, b) in {"coarse_fwd": feats, "coarse_bwd": feats[::-1]}.items():
        torch.testing.assert_close(net.solve(a, b, 3)[0], g[name], rtol=0, atol=1e-5)


def test_golden_inverse_consistency(development_data: Path) -> None:
    """The authors' fields: channels in the order of grid_sample, in units of half the volume."""
    g = golden(development_data, "convex_parts")
    half = torch.tensor(g["ic_in1"].shape[1:]).view(1, 3, 1, 1, 1) / 2
    ends = inverse_consistent(*[g[name][None].flip(1) * half for name in ("ic_in1", "ic_in2")])
    for end, name in zip(ends, ("ic_out1", "ic_out2")):
        torch.testing.assert_close((end / half)[0].flip(0), g[name], rtol=0, atol=1e-6)


def test_golden_mind(development_data: Path) -> None:
    g = golden(development_data, "convex_parts")
    torch.testing.assert_close(mind_ssc(g["mind_image"][None, None])[0], g["mind_r1d2"], rtol=0, atol=1e-5)


class GoldenFeatures(nn.Module):
    """The replacement extractor of the golden file: two fixed convolutions, unit length."""

    def __init__(self, fine: Tensor, coarse: Tensor) -> None:
        super().__init__()
        self.fine, self.coarse = fine, coarse

    def forward(self, image: Tensor, finest: bool) -> Tensor:
        z = (image + 50) / 255
        fine = F.normalize(F.conv3d(z, self.fine, stride=2, padding=2), dim=1)
        if finest:
            return fine
        coarse = F.normalize(F.conv3d(F.avg_pool3d(z, 4, 4), self.coarse, padding=1), dim=1)
        coarse = F.interpolate(coarse, size=fine.shape[2:], mode="trilinear", align_corners=True)
        return torch.cat([fine, F.normalize(coarse, dim=1)], 1)


def test_golden_solver(development_data: Path) -> None:
    """Three levels of the authors' solver, coupling in normalised units."""
    g = golden(development_data, "samconvex_solver_48x40x56")
    features = GoldenFeatures(g["w_fine"], g["w_coarse"])
    net = SAMConvex(features=features, thetas=TWICE, smoothing=3, coupling="normalised")
    image = torch.stack([g["source"], g["target"]])[None]
    size = torch.tensor(image.shape[2:]).view(3, 1, 1, 1)
    expected = (g["phi_fp32"] + 1) / 2 * (size - 1) - identity(image.shape[2:], image)[0]
    torch.testing.assert_close(net(image)[0], expected, rtol=0, atol=1e-4)


# ---- promises -------------------------------------------------------------------------------------------------------


def test_mind_forgets_contrast() -> None:
    """Its reason to exist: a linear change of contrast changes nothing, and a constant scan gives no NaN."""
    image = smooth_scan((20, 24, 22))
    torch.testing.assert_close(mind_ssc(3 - 2 * image), mind_ssc(image), rtol=0, atol=1e-4)
    assert torch.isfinite(mind_ssc(torch.ones(1, 1, 8, 8, 8))).all()


def test_shift_is_found() -> None:
    moving = smooth_scan((48, 56, 48))
    shift = torch.tensor([4.0, -6.0, 3.0]).view(1, 3, 1, 1, 1).expand(1, 3, 48, 56, 48)
    fixed = warp(moving, shift)
    disp = SAMConvex()(torch.cat([moving, 1 - fixed], 1))  # contrast inverted
    inner = (slice(None), slice(None)) + (slice(12, -12),) * 3
    assert (disp - shift)[inner].abs().mean() < 0.5


def test_pooled_features_keep_the_scale() -> None:
    """Features averaged over blocks say how many blocks; a block is `stride` voxels, whatever the size of the scan."""
    disp = SAMConvex(features=MIND(stride=3)).onto_scan(torch.full((1, 3, 7, 6, 5), 2.0), (20, 18, 13))
    assert disp.shape == (1, 3, 20, 18, 13)
    torch.testing.assert_close(disp, torch.full_like(disp, 6.0))


@pytest.mark.parametrize("features", ("mind", "sam"))
def test_constant_scan_is_said(features: str) -> None:
    constant, image = torch.full((1, 1, 32, 32, 32), 0.7), smooth_scan((32, 32, 32))
    with pytest.warns(RegistrationWarning, match="features of the moving scan are the same everywhere"):
        disp = SAMConvex(features=features)(torch.cat([constant, image], 1))
    assert torch.isfinite(disp).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegistrationWarning)
        SAMConvex(features=features)(torch.cat([image.roll(1, 2), image], 1))


def test_coupling_in_voxels_smooths_more() -> None:
    """The released units nearly do nothing: the field of random costs stays rougher than with voxels."""
    cost = torch.rand(1, 125, 16, 16, 16)
    step = 2 / torch.tensor([15.0, 15.0, 15.0])
    fields = [coupled_convex(cost, 2, smoothing=1, step=s) for s in (None, step)]
    rough = [sum(d.diff(dim=axis).square().mean() for axis in (2, 3, 4)) for d in fields]
    assert rough[0] < 0.7 * rough[1]


def test_inverse_consistency_lowers_the_error() -> None:
    forward, backward = (F.interpolate(torch.randn(1, 3, 4, 4, 4), size=(16,) * 3, mode="trilinear") for _ in range(2))
    ends = inverse_consistent(forward, backward)
    rest = [(a + warp(b, a, padding="zeros")).norm(dim=1).mean() for a, b in ((forward, backward), ends)]
    assert rest[1] < 0.05 * rest[0]


@pytest.mark.parametrize("radii", ((3,), (6,), (3, 3), (2, 3, 3)))
def test_levels_of_table_3(radii: tuple[int, ...]) -> None:
    moving = smooth_scan((33, 40, 37))
    disp = SAMConvex(radii=radii, consistent=len(radii) == 2)(torch.cat([moving, moving.roll(2, 2)], 1))
    assert disp.shape == (1, 3, 33, 40, 37) and torch.isfinite(disp).all() and disp[:, 0].mean() < -0.5


@pytest.mark.parametrize("options", ({}, {"cost_smoothing": 2, "padding": "zeros", "consistent": True}))
def test_budget_changes_nothing(options: dict) -> None:
    """Slabs of three planes give what the whole volume gives."""
    image = torch.cat([smooth_scan((44, 32, 36)), smooth_scan((44, 32, 36), 1)], 1)
    whole = SAMConvex(radii=(2, 3), **options)(image)
    budget = 3 * 4 * 343 * 16 * 18 / 2**30
    torch.testing.assert_close(SAMConvex(radii=(2, 3), budget=budget, **options)(image), whole, rtol=0, atol=1e-5)
    assert whole.abs().mean() > 0.1


def test_batch_and_channels() -> None:
    scans = torch.cat([smooth_scan((24, 24, 24), seed) for seed in range(8)]).view(2, 4, 24, 24, 24)
    net = SAMConvex(channels=2, radii=(2, 2))
    torch.testing.assert_close(net(scans), torch.cat([net(scans[:1]), net(scans[1:])]), rtol=0, atol=1e-5)


def test_constant_scans_stay_where_they_are() -> None:
    """Features that say nothing: of equal costs the shortest offset is taken."""
    assert SAMConvex()(torch.ones(1, 2, 24, 24, 24)).abs().max() == 0


def test_of_equal_costs_the_shortest_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    """v_0 against a sort by cost, then length, then number; whole numbers make many ties, and parts are small."""
    monkeypatch.setattr(convex, "SLAB", 1 << 10)
    cost = torch.randint(0, 4, (2, 27, 5, 4, 3), generator=torch.Generator().manual_seed(0)).float()
    table = torch.stack(torch.meshgrid(*[torch.arange(-1.0, 2)] * 3, indexing="ij"), -1).view(27, 3)
    lengths, found = table.square().sum(1).tolist(), convex._shortest(cost, 1)
    for b, i, j, k in np.ndindex(2, 5, 4, 3):
        costs = cost[b, :, i, j, k].tolist()
        best = min(range(27), key=lambda n: (costs[n], lengths[n], n))
        assert found[b, :, i, j, k].tolist() == table[best].tolist()


class Autocast(nn.Module):
    """Features that are taken under autocast, whatever holds outside."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.inner = features
        if hasattr(features, "pooled"):
            self.pooled = features.pooled

    def forward(self, image: Tensor, finest: bool = True) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(image, finest)


@pytest.mark.parametrize("features", ("sam", "mind"))
def test_autocast_leaves_the_displacement_exact(features: str) -> None:
    """Features may be bfloat16; costs, coupling and displacements are float32."""
    torch.manual_seed(0)
    net, pair = SAMConvex(features=features), torch.cat([smooth_scan((32, 40, 32), seed) for seed in (0, 1)], 1)
    expected = SAMConvex(features=Autocast(net.features))(pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        disp = net(pair)
    assert disp.dtype == torch.float32 and expected.abs().mean() > 0.05
    torch.testing.assert_close(disp, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("coupling", ("voxel", "normalised"))
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_takes_another_size(coupling: str) -> None:
    net = SAMConvex(radii=(2, 2), coupling=coupling).eval()
    pairs = [torch.cat([smooth_scan(size, seed) for seed in (0, 1)], 1) for size in ((20, 20, 20), (28, 24, 20))]
    traced = torch.jit.trace(net, pairs[0])
    torch.testing.assert_close(traced(pairs[1]), net(pairs[1]), rtol=0, atol=1e-4)


def test_resized_field_is_in_voxels() -> None:
    net = SAMConvex(radii=(2,))
    features = torch.rand(1, 4, 8, 8, 8)
    small = net.solve(features, features, 2)
    assert small.abs().max() == 0
    assert resize_disp(small + 1, (16, 16, 16)).mean() == pytest.approx(15 / 7)


def test_pooled_features_are_refused_as_similarity() -> None:
    """MIND averaged over blocks lies on another grid than `refine` takes features on; as "mind" it is computed anew."""
    with pytest.raises(InputError, match="--refine_similarity features: not with MIND, .*; mind or lncc would do"):
        RegistrationInferer(1, similarity="features")(torch.rand(1, 2, 16, 16, 16), SAMConvex(radii=(1,)))


def test_rejects() -> None:
    with pytest.raises(ValueError, match="'image' must have shape .B, 2, I, J, K., moving then fixed, got"):
        SAMConvex()(torch.zeros(1, 1, 8, 8, 8))
    with pytest.raises(ValueError, match="'radii' must be one number >= 1 a level"):
        SAMConvex(radii=())
    with pytest.raises(ValueError, match="'coupling' must be one of"):
        SAMConvex(coupling="mm")
    with pytest.raises(ValueError, match="mind_ssc.. 'image' must have shape"):
        mind_ssc(torch.zeros(1, 2, 8, 8, 8))


def test_mind_of_a_scan_with_its_geometry() -> None:
    """MONAI's MetaTensor is described as a plain tensor is."""
    scan = torch.rand(1, 1, 9, 10, 11)
    assert torch.equal(torch.as_tensor(mind_features(MetaTensor(scan))), mind_features(scan))
