"""match against softmaxes worked out by hand and its own reference."""

import importlib
import itertools
import math
import types
from collections.abc import Callable

import pytest
import torch

from common.ops import _patches, match

BACKENDS = ("reference", "lean")
BLOCKS = {"one block": 1 << 19, "planes": 27 * 4 * 80, "rows": 27 * 4 * 16}


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_values_corner(backend: str) -> None:
    """Constant features: at a corner 8 of the 27 scores are s and 19 are 0, at a centre all are equal."""
    s = 1.3
    disp = match(torch.ones(1, 1, 3, 4, 5), torch.full((1, 1, 3, 4, 5), s), backend=backend)
    expected = 4 * (math.exp(s) - 1) / (8 * math.exp(s) + 19)
    torch.testing.assert_close(disp[0, :, 0, 0, 0], torch.full((3,), expected))
    torch.testing.assert_close(disp[0, :, 2, 3, 4], torch.full((3,), -expected))
    torch.testing.assert_close(disp[0, :, 1, 2, 2], torch.zeros(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", ((1, 0, 0), (0, -1, 0), (0, 0, 1), (-1, 1, 1)))
def test_known_values_shift(shift: tuple[int, int, int], backend: str) -> None:
    """If fixed(x) = moving(x + d) and features are distinct and strong, the displacement is d."""
    moving = torch.nn.functional.normalize(torch.randn(1, 32, 6, 7, 8), dim=1) * 12
    fixed = moving.roll([-n for n in shift], dims=(2, 3, 4))
    inner = match(fixed, moving, backend=backend)[0, :, 1:-1, 1:-1, 1:-1]
    expected = torch.tensor(shift, dtype=torch.float32).view(3, 1, 1, 1).expand_as(inner)
    torch.testing.assert_close(inner, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("radius", (0, 1, 2))
def test_known_values_sum(radius: int, backend: str) -> None:
    """Eq. 8-10 at one voxel, neighbour by neighbour."""
    fixed, moving = torch.randn(2, 3, 4, 3, 5), torch.randn(2, 3, 4, 3, 5)
    at = (1, 2, 0)
    steps = list(itertools.product(range(-radius, radius + 1), repeat=3))
    scores = []
    for step in steps:
        where = [a + d for a, d in zip(at, step)]
        inside = all(0 <= w < n for w, n in zip(where, fixed.shape[2:]))
        scores.append(fixed[1, :, 1, 2, 0] @ moving[1, :, where[0], where[1], where[2]] if inside else torch.zeros(()))
    expected = torch.stack(scores).softmax(0) @ torch.tensor(steps, dtype=torch.float32)
    torch.testing.assert_close(match(fixed, moving, radius, backend=backend)[1, :, 1, 2, 0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strong_scores_stay_finite(backend: str) -> None:
    """Scores of some hundreds, as instance-normalised features give, must not overflow the exponential."""
    feat = torch.full((1, 64, 3, 3, 3), 4.0)
    disp = match(feat, feat, backend=backend)
    # float32 steps by 1.2e-4 at a log-sum-exp of 1026, which is the relative error of a weight
    torch.testing.assert_close(disp[0, :, 0, 0, 0], torch.full((3,), 0.5), rtol=0, atol=1e-4)


@pytest.mark.parametrize("radius", (1, 2))
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
def test_lean_matches_reference(
    block: int, radius: int, arrange: Callable, assert_backends_agree: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_patches, "BLOCK_FLOATS", block)
    inputs = {"feat_fixed": torch.randn(2, 4, 5, 7, 9), "feat_moving": torch.randn(2, 4, 5, 7, 9)}
    assert_backends_agree(lambda **kw: match(**kw, radius=radius), inputs, arrange)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("size", ((5, 1, 1), (1, 5, 1), (1, 1, 5), (2, 1, 3), (1, 1, 1)))
def test_lean_on_thin_grids(size: tuple[int, int, int], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The windows of a line of voxels overlap in memory, which a gradient must not write to."""
    monkeypatch.setattr(_patches, "BLOCK_FLOATS", block)
    inputs = [torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    grads = []
    for backend in BACKENDS:
        out = match(*inputs, backend=backend)
        weight = torch.arange(1.0, out.numel() + 1).view(out.shape)
        grads.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    for name, found, expected in zip(("disp", "feat_fixed", "feat_moving"), *grads):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(("size", "radius", "block"), (((5, 6, 7), 1, 128), ((4, 1, 5), 2, 256), ((5, 1, 1), 1, 256)))
def test_kernel_matches_reference(
    size: tuple[int, int, int],
    radius: int,
    block: int,
    arrange: Callable,
    assert_backends_agree: Callable,
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Odd sizes and an axis of one voxel, over several programs and in one, of which the last is not full.

    float32 steps by 2e-6 at the log-sum-exp of 20 that occurs here, which is the relative error of a weight; its share
    in a gradient is the weight times up to 16.
    """
    monkeypatch.setattr("common.ops._triton.MAX_BLOCK", block)
    inputs = {"feat_fixed": torch.randn(2, 5, *size), "feat_moving": torch.randn(2, 5, *size)}
    assert_backends_agree(lambda **kw: match(**kw, radius=radius), inputs, arrange, backend="triton", atol=3e-5)


def test_kernel_radius_zero(kernel_device: torch.device) -> None:
    """A window of one voxel leaves no choice: no displacement, and nothing to learn."""
    fixed, moving = (torch.randn(2, 5, 3, 4, 5, device=kernel_device, requires_grad=True) for _ in range(2))
    disp = match(fixed, moving, 0, backend="triton")
    disp.sum().backward()
    assert not disp.any() and not fixed.grad.any() and not moving.grad.any()


def test_kernel_strong_scores(kernel_device: torch.device) -> None:
    """As test_strong_scores_stay_finite, with the gradients; the running softmax starts again at every larger score."""
    feat = torch.full((1, 64, 3, 3, 3), 4.0, device=kernel_device, requires_grad=True)
    disp = match(feat, feat, backend="triton")
    disp.sum().backward()
    torch.testing.assert_close(disp[0, :, 0, 0, 0].cpu(), torch.full((3,), 0.5), rtol=0, atol=1e-4)
    assert feat.grad.isfinite().all()


def test_kernel_half(assert_half_kernel_agrees: Callable) -> None:
    inputs = {"feat_fixed": torch.randn(1, 5, 3, 4, 5), "feat_moving": torch.randn(1, 5, 3, 4, 5)}
    assert_half_kernel_agrees(match, inputs, single=("output",))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("radius", (1, 2))
def test_gradcheck(radius: int, backend: str) -> None:
    fixed, moving = (torch.randn(2, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: match(a, b, radius, backend=backend), (fixed, moving))


def test_opcheck() -> None:
    fixed, moving = (torch.randn(2, 3, 3, 4, 5, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.monai_registration.match.default, (fixed, moving, 1))
    fixed, moving, grad = fixed.detach(), moving.detach(), torch.randn(2, 3, 3, 4, 5)
    disp, lse = torch.ops.monai_registration.match(fixed, moving, 1)
    arguments = (grad, fixed, moving, disp, lse, 1)
    torch.library.opcheck(torch.ops.monai_registration.match_backward.default, arguments)


def test_kernel_opcheck(kernel_device: torch.device) -> None:
    importlib.import_module("common.ops.match.kernel")  # registers the operators
    fixed, moving = (torch.randn(1, 3, 2, 3, 2, device=kernel_device, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.monai_registration.match_triton.default, (fixed, moving, 1))
    fixed, moving, grad = fixed.detach(), moving.detach(), torch.randn(1, 3, 2, 3, 2, device=kernel_device)
    disp, lse = torch.ops.monai_registration.match_triton(fixed, moving, 1)
    arguments = (grad, fixed, moving, disp, lse, 1)
    torch.library.opcheck(torch.ops.monai_registration.match_triton_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_gives_float32(dtype: torch.dtype, backend: str) -> None:
    """A displacement is never rounded to half: the result is that of the same features in float32."""
    fixed, moving = (torch.randn(1, 4, 3, 4, 5).to(dtype) for _ in range(2))
    out = match(fixed, moving, backend=backend)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, match(fixed.float(), moving.float()))


FEAT = torch.zeros(2, 4, 3, 4, 5)


@pytest.mark.parametrize(
    ("change", "text"),
    (
        ({"feat_fixed": FEAT[0]}, r"match\(\) 'feat_fixed' must have shape \(B, C, I, J, K\), got \(4, 3, 4, 5\)"),
        ({"feat_fixed": FEAT.long()}, r"match\(\) 'feat_fixed' must be floating point, got torch.int64"),
        ({"feat_moving": None}, r"match\(\) 'feat_moving' must be a torch.Tensor, got NoneType"),
        ({"feat_moving": FEAT[:, :3]}, r"match\(\) 'feat_moving' must have 4 channels, got 3"),
        (
            {"feat_moving": FEAT[:, :, :, :2]},
            r"'feat_moving' must share batch and grid \(2, 3, 4, 5\) with 'feat_fixed', got \(2, 3, 2, 5\)",
        ),
        ({"feat_moving": FEAT.to("meta")}, r"'feat_moving' must be on the device of 'feat_fixed' \(cpu\), got meta"),
        ({"radius": -1}, r"match\(\) 'radius' must be >= 0, got -1"),
        ({"radius": 1.5}, r"match\(\) 'radius' must be >= 0, got 1.5"),
    ),
)
def test_rejects(change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        match(**({"feat_fixed": FEAT, "feat_moving": FEAT} | change))


def test_rejects_backend(refused: Callable) -> None:
    refused(match, {"feat_fixed": FEAT, "feat_moving": FEAT})


def test_uninitialised_memory_is_nan() -> None:
    """The guard itself: what a module of `common` allocates here holds NaN, what anybody else does is left alone."""
    module = types.ModuleType("common.invented")
    exec("import torch\ndef make(x): return torch.empty(3), torch.empty_like(x), x.new_empty(2, 2)", vars(module))
    assert all(made.isnan().all() for made in module.make(torch.zeros(4)))
    assert not any(made.is_floating_point() for made in module.make(torch.zeros(4, dtype=torch.int64))[1:])
