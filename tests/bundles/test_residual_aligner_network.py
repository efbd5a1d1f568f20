"""RAN against the golden arrays of the authors' network, and the promises its forward makes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.losses import RegistrationLoss
from common.ops import warp
from residual_aligner import RAN, BothDirections, from_official
from residual_aligner.aligner import ResidualAligner, ScalarNorm, SharedLayers
from residual_aligner.network import VARIANTS, enlarge

# variant -> parameters with six heads, masks and confidence; the paper's Table 2 says 0.71, 0.72, 0.71, 0.75 million
COUNTS = {"ran0": 631_161, "ran3": 670_713, "ran4": 661_729, "ran4plus": 687_665, "released": 738_065}


@pytest.fixture(scope="module")
def golden(development_data: Path) -> dict[str, np.ndarray]:
    path = development_data / "golden" / "ran_64x48x80.npz"
    if not path.is_file():
        pytest.skip(f"golden arrays not found: {path}")
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def official(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The authors' variables by their own names."""
    return {name[2:]: array for name, array in golden.items() if name.startswith("w/")}


def packed(golden: dict[str, np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack([golden["moving"], golden["fixed"]])[None])


def scans(size: tuple[int, int, int], *, batch: int = 1, channels: int = 1) -> Tensor:
    """Packed pairs in [0, 1]: smooth structure with some texture."""
    coarse = torch.rand(batch, 2 * channels, 6, 6, 6)
    smooth = F.interpolate(coarse, size=size, mode="trilinear", align_corners=True)
    return 0.9 * smooth + 0.1 * torch.rand(smooth.shape)


# ---- the authors' network -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registration(golden: dict[str, np.ndarray]) -> tuple:
    """The golden pair registered with the golden weights: both directions, and by forward."""
    net = RAN(variant="released").eval()
    net.load_state_dict(from_official(official(golden)))
    with torch.no_grad():
        return net.forward_train(packed(golden)), net(packed(golden))


def stored(golden: dict[str, np.ndarray], name: str, found: Tensor) -> tuple[Tensor, Tensor]:
    """What the file holds of an array (C, I, J, K), thinned or not, and the same voxels of `found`."""
    full = next(key for key in golden if key == name or key.startswith(f"{name}_every"))
    step = int(full.rpartition("every")[2]) if full != name else 1
    return found[:, ::step, ::step, ::step], torch.from_numpy(golden[full]).permute(3, 0, 1, 2)


@pytest.mark.parametrize("k", range(5))
@pytest.mark.parametrize("number", (0, 1))
def test_golden_modules(golden: dict, registration: tuple, k: int, number: int) -> None:
    """Displacement, attributes and features of every module, moving and fixed stream."""
    module = registration[0].modules[k]
    direction = ("12", "21")[number]
    for name, value, tolerance in (
        (f"ra{k}_ddf{direction}", module.disp, 2e-4),
        (f"ra{k}_attr{direction}", module.attributes, 2e-3),
        (f"ra{k}_feat{number + 1}", module.feat, 2e-4),
    ):
        got, expected = stored(golden, name, value[number])
        assert expected.abs().mean() > 0.05, name
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_golden_displacement(golden: dict, registration: tuple) -> None:
    both, disp = registration
    expected = torch.from_numpy(golden["disp"]).permute(3, 0, 1, 2)[None]
    for got in (both.disp, disp):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)
    warped = warp(packed(golden)[:, :1], disp, padding="zeros")
    torch.testing.assert_close(warped[0, 0], torch.from_numpy(golden["warped"]), rtol=0, atol=5e-5)


def test_from_official(golden: dict) -> None:
    """All 264 variables; the published checkpoint lacks the ten of the confidence, and its masks are raw."""
    state = from_official(official(golden))
    expected = RAN(variant="released").state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()} and len(state) == 264
    missing = {f"conv3d_{33 + 11 * k}/{kind}" for k in range(5) for kind in ("kernel", "bias")}
    published = {name: array for name, array in official(golden).items() if name not in missing}
    net = RAN(variant="released", confidence=False, mask="raw")
    assert len(published) == 254 and sum(p.numel() for p in net.parameters()) == 738_030
    net.load_state_dict(from_official(published))
    with torch.no_grad():
        assert torch.isfinite(net(packed(golden)[:, :, :32, :32, :32])).all()


def test_from_official_rejects() -> None:
    for name in ("conv3d_99/kernel", "dense/kernel", "conv3d/moving_mean", "conv3d"):
        with pytest.raises(ValueError, match=rf"must hold the variables of RAN only, got '{name}'"):
            from_official({name: np.zeros((3, 3, 3, 1, 8))})


# ---- pieces ---------------------------------------------------------------------------------------------------------


def test_scalar_norm() -> None:
    """Space and channels of each sample together; one weight, one bias; 1e-3 added to the deviation."""
    norm, x = ScalarNorm(), 3 * torch.randn(2, 4, 5, 6, 7, dtype=torch.float64) + 2
    x[1] *= 1e-3
    norm.weight.data.fill_(1.5)
    norm.bias.data.fill_(-0.5)
    for got, sample in zip(norm(x), x):
        expected = 1.5 * (sample - sample.mean()) / (sample.std(correction=0) + 1e-3) - 0.5
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_scalar_norm_of_a_constant() -> None:
    """An empty scan gives no NaN, forward or backward."""
    x = torch.full((1, 2, 3, 3, 3), 0.3, requires_grad=True)
    out = ScalarNorm()(x)
    out.sum().backward()
    assert out.abs().max() < 1e-3 and torch.isfinite(x.grad).all()


def test_scalar_norm_gradcheck() -> None:
    x = torch.randn(2, 2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ScalarNorm().double(), (x,))


def test_enlarge() -> None:
    """Every voxel becomes a block; a displacement given in voxels doubles with the resolution in `align`."""
    x = torch.arange(8.0).view(1, 1, 2, 2, 2)
    big = enlarge(x, 2)
    assert big.shape == (1, 1, 4, 4, 4) and enlarge(x, 1) is x
    assert torch.equal(big[..., ::2, ::2, ::2], x) and torch.equal(big[..., 1::2, 1::2, 1::2], x)


def aligner(**options) -> tuple[ResidualAligner, SharedLayers, Tensor, Tensor, tuple[Tensor, Tensor]]:
    heads = options.get("heads", 6)
    size = (2, 8, 6, 7, 5)
    last = 0.5 * torch.randn(2, 3, *size[2:]), torch.randn(2, heads, *size[2:])
    own, other = torch.randn(size), torch.randn(size)
    return ResidualAligner(8, 2, **options), SharedLayers(heads), own, other, last


@pytest.mark.parametrize("first", (True, False))
@pytest.mark.parametrize("heads", (1, 4))
def test_aligner_shapes(first: bool, heads: int) -> None:
    module, shared, own, other, last = aligner(first=first, heads=heads)
    out = module(shared, own, other, None if first else last)
    assert out.disp.shape == (2, 3, 6, 7, 5) and out.attributes.shape == (2, heads, 6, 7, 5)
    assert out.feat.shape == own.shape


def test_weights_are_eq_12() -> None:
    """Masks sum to the confidence over the heads; raw masks are the attributes; without masks each head counts 1."""
    module, _, _, _, (_, attributes) = aligner()
    increment = torch.randn_like(attributes)
    weight = module.weights(attributes, increment)
    assert weight.shape == (2, 6, 1, 6, 7, 5)
    sure = F.relu(module.confidence(F.leaky_relu(increment, 0.01)))
    assert 0.1 < (sure > 0).float().mean() < 1, "both sides of the ReLU should occur"
    torch.testing.assert_close(weight.sum(1), sure)
    torch.testing.assert_close(weight[:, :, 0], attributes.softmax(1) * sure)
    plain = aligner(confidence=False)[0]
    torch.testing.assert_close(plain.weights(attributes, increment)[:, :, 0], attributes.softmax(1))
    raw = aligner(confidence=False, mask="raw")[0]
    assert torch.equal(raw.weights(attributes, increment)[:, :, 0], attributes)
    single = aligner(confidence=False, multi_head=False)[0]
    assert single.weights(None, None) == 1
    sure_only = aligner(multi_head=False)[0]
    expected = F.relu(sure_only.confidence(F.leaky_relu(increment, 0.01)))
    torch.testing.assert_close(sure_only.weights(attributes, increment)[:, :, 0], expected)


def test_components_are_fused_alike() -> None:
    """C^2 and C^4 see one component at a time: exchanging components of the fields exchanges those of the result."""
    module, shared, _, _, last = aligner()
    fields, increment = torch.randn(2, 18, 6, 7, 5), torch.randn(2, 6, 6, 7, 5)
    disp, attributes = module.accumulate(shared, fields, increment, last)
    order = [2, 0, 1]
    swapped = fields.unflatten(1, (6, 3))[:, :, order].flatten(1, 2)
    other, same = module.accumulate(shared, swapped, increment, (last[0][:, order], last[1]))
    torch.testing.assert_close(other, disp[:, order])
    assert torch.equal(same, attributes) and (other - disp).abs().max() > 0.1


def test_displacement_is_limited() -> None:
    """To twice the grid, along each axis."""
    module, shared, own, other, last = aligner()
    shared.disp_out.bias.data.fill_(1e4)
    disp, _ = module.accumulate(shared, torch.randn(2, 18, 6, 7, 5), torch.randn(2, 6, 6, 7, 5), last)
    assert [disp[:, c].unique().tolist() for c in range(3)] == [[11.0], [13.0], [9.0]]


# ---- the network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_count(variant: str) -> None:
    assert sum(p.numel() for p in RAN(variant=variant).parameters()) == COUNTS[variant]


def test_pool_sizes_and_dilations() -> None:
    """Section 2.3: p_k = 2^(K-q) up to k = q, then halved; dilations keep the receptive field of q = 0."""
    for variant, q in (("ran0", 0), ("ran3", 3), ("ran4", 4), ("ran4plus", 4), ("released", 3)):
        g = VARIANTS[variant]
        assert g.pool == tuple(2 ** (4 - max(k, q)) for k in range(5))
        assert [p * r for p, r in zip(g.pool, g.dilation)] == [16, 8, 4, 2, 1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_size(variant: str) -> None:
    """17 x 34 x 20 is padded at the far end only, and cut back to its own grid."""
    net, image = RAN(variant=variant).eval(), scans((17, 34, 20))
    with torch.no_grad():
        disp = net(image)
        padded = net(F.pad(image, (0, 12, 0, 14, 0, 15)))
    assert disp.shape == (1, 3, 17, 34, 20)
    assert torch.isfinite(disp).all() and disp.abs().max() > 0
    assert torch.equal(disp, padded[:, :, :17, :34, :20])


@pytest.mark.parametrize("variant", ("ran0", "ran3", "ran4"))
def test_batch_equals_single_runs(variant: str) -> None:
    net = RAN(variant=variant).eval()
    image = scans((16, 32, 18), batch=2)
    with torch.no_grad():
        together, apart = net(image), torch.cat([net(image[:1]), net(image[1:])])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.05


@pytest.mark.parametrize("variant", ("ran0", "ran3", "ran4"))
def test_both_directions(variant: str) -> None:
    """Exchanging the scans exchanges the two displacements; forward gives that of the fixed grid."""
    net, image = RAN(variant=variant).eval(), scans((16, 32, 18))
    with torch.no_grad():
        there, back, disp = net.forward_train(image), net.forward_train(image.flip(1)), net(image)
    torch.testing.assert_close(disp, there.disp, rtol=0, atol=1e-4)
    torch.testing.assert_close(there.disp, back.disp_back, rtol=0, atol=1e-4)
    torch.testing.assert_close(there.disp_back, back.disp, rtol=0, atol=1e-4)
    assert (there.disp - there.disp_back).abs().max() > 0.05
    for k, module in enumerate(there.modules):
        pool = net.geometry.pool[k]
        assert module.disp.shape == (2, 3, 16 // pool, 32 // pool, 32 // pool)
        assert module.feat.shape[1] == net.geometry.decoder[k]


def test_same_scans_give_the_same_displacements() -> None:
    """A scan to itself: nothing tells the directions apart."""
    net, image = RAN().eval(), scans((16, 16, 16))
    image = image[:, :1].repeat(1, 2, 1, 1, 1)
    with torch.no_grad():
        found = net.forward_train(image)
    torch.testing.assert_close(found.disp, found.disp_back, rtol=0, atol=1e-4)


def test_two_channels() -> None:
    """The first C channels are the moving scan."""
    net, image = RAN(2).eval(), scans((16, 32, 16), channels=2)
    with torch.no_grad():
        disp, swapped = net(image), net(image.roll(2, dims=1))
    assert disp.shape == (1, 3, 16, 32, 16)
    assert (disp - swapped).abs().max() > 1e-2


@pytest.mark.parametrize(
    "options",
    (
        {"variant": "ran0"},
        {"variant": "ran4", "recompute": True},
        {"heads": 2},
        {"heads": 1, "multi_head": False, "confidence": False},
        {"heads": 1, "multi_head": False},
    ),
)
def test_training_step(options: dict) -> None:
    """Every parameter gets a finite gradient, and steps along it lower the loss."""
    net, image = RAN(**options).train(), scans((32, 16, 32))
    loss_of = BothDirections(RegistrationLoss(window=5, smoothness=0.1), consistency=0.05)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-4)
    history = []
    for step in range(4):
        optimizer.zero_grad()
        loss = loss_of(net.forward_train(image), image)
        loss.backward()
        history.append(loss.item())
        for name, parameter in net.named_parameters() if step == 0 else ():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name
        optimizer.step()
    assert history[-1] < history[0] - 0.003, history


def test_recompute_gives_the_same_gradients() -> None:
    image, grads = scans((16, 16, 32)), []
    for recompute in (False, True):
        torch.manual_seed(1)
        net = RAN(variant="ran4", recompute=recompute)
        net(image).square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    for plain, again in zip(*grads):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)


def test_without_masks_or_confidence() -> None:
    """Each option changes the result. Confidence has 5 layers of 7 parameters; without masks, nothing asks for the last
    module's attributes, whose fusion has 5850 + 2."""
    state, image, disps, counts = RAN().state_dict(), scans((16, 16, 32)), [], []
    for options in ({}, {"confidence": False}, {"multi_head": False}, {"mask": "raw"}):
        net = RAN(**options).eval()
        net.load_state_dict(state, strict=False)
        with torch.no_grad():
            disps.append(net(image))
        counts.append(sum(p.numel() for p in net.parameters()))
    assert [COUNTS["ran3"] - n for n in counts] == [0, 35, 5852, 0]
    assert all((other - disps[0]).abs().max() > 1e-3 for other in disps[1:])


@pytest.mark.parametrize(
    "shape", ((1, 1, 16, 16, 16), (1, 3, 16, 16, 16), (1, 4, 16, 16, 16), (2, 16, 16, 16), (1, 2, 16, 16))
)
def test_rejects_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"RAN\(\) 'image' must have shape \(B, 2, I, J, K\), moving then"):
        RAN()(torch.zeros(shape))


def test_rejects_options() -> None:
    with pytest.raises(ValueError, match=r"RAN\(\) 'variant' must be one of ran0, .*, got 'ran5'"):
        RAN(variant="ran5")
    with pytest.raises(ValueError, match=r"RAN\(\) 'mask' must be one of softmax, raw, got 'hard'"):
        RAN(mask="hard")
    with pytest.raises(ValueError, match=r"RAN\(\) 'heads' must be >= 1, got 0"):
        RAN(heads=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_equals_eager() -> None:
    net, image, other = RAN().eval(), *(scans((16, 32, 16)) for _ in range(2))
    with torch.no_grad():
        traced = torch.jit.trace(net, image, check_trace=False)
        for pair in (image, other):
            torch.testing.assert_close(traced(pair), net(pair), rtol=0, atol=1e-4)
    assert "monai_registration" not in str(traced.inlined_graph)


def test_starts_near_identity() -> None:
    """Displacements of a fraction of a voxel, that pass from module to module as they are."""
    torch.manual_seed(0)
    net, image = RAN().eval(), scans((32, 32, 32))
    with torch.no_grad():
        found = net.forward_train(image)
        aligner, field = net.aligners[1], torch.randn(1, 3, 8, 8, 8)
        nothing = torch.zeros(1, 18, 8, 8, 8), torch.zeros(1, 6, 8, 8, 8)
        disp, _ = aligner.accumulate(net.shared, *nothing, (field, nothing[1]))
    assert 0.01 < found.disp.abs().mean() < 0.5
    assert (disp - field).abs().max() < 0.1 * field.abs().max()


def test_autocast_leaves_the_displacement_exact() -> None:
    """Feature convolutions may run in bfloat16; displacements are fused, warped and returned in float32."""
    net, image = RAN().eval(), scans((32, 32, 32))
    with torch.no_grad():
        for layer in (net.shared.heads_out, net.flow):
            torch.nn.init.kaiming_normal_(layer.weight)  # farther from the start, where little moves
        expected = net(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            disp = net(image)
    assert disp.dtype == torch.float32
    assert expected.abs().mean() > 0.05 and (disp - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_on_kernels(kernel_device: torch.device) -> None:
    """On the Triton kernels' device, whatever warps there, as on the CPU."""
    if kernel_device.type == "cpu":
        pytest.skip("needs a CUDA device; the kernels alone are tested in the interpreter")
    net, image = RAN().eval(), scans((16, 32, 16))
    with torch.no_grad():
        expected, disp = net(image), net.to(kernel_device)(image.to(kernel_device)).cpu()
    torch.testing.assert_close(disp, expected, rtol=0, atol=1e-3)
