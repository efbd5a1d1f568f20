"""cost_volume and CorrelationPyramid against loops, the volumes of two published solvers, and their own reference."""

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pairs import off_grid, pair
from torch import Tensor

from common.ops import cost_volume
from common.ops.cost_volume import lean

BACKENDS = ("reference", "lean")
BUDGETS = {"one block": 32 << 20, "several blocks": 1 << 12}
KINDS = tuple(itertools.product(("dot", "ssd"), ("border", "zeros")))
BOTH = (("dot", "zeros"), ("ssd", "border"))  # where all four would only take longer


def at(volume: Tensor, where: tuple[int, int, int], padding: str) -> Tensor:
    """Features (C) of one voxel of (C, I, J, K), which may lie outside."""
    inside = [min(max(w, 0), n - 1) for w, n in zip(where, volume.shape[1:])]
    value = volume[:, inside[0], inside[1], inside[2]]
    return value if padding == "border" or tuple(inside) == tuple(where) else torch.zeros_like(value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("similarity", "padding"), KINDS)
@pytest.mark.parametrize("radius", (0, 1, 2))
def test_known_values(radius: int, similarity: str, padding: str, backend: str) -> None:
    """Every offset in turn, i slowest and k fastest, at a corner, at a face and inside."""
    given = pair((4, 3, 5))
    out = cost_volume(**given, radius=radius, similarity=similarity, padding=padding, backend=backend)
    assert out.shape == (2, (2 * radius + 1) ** 3, 4, 3, 5)
    span = range(-radius, radius + 1)
    for i, j, k in ((0, 0, 4), (1, 2, 2), (2, 1, 3)):
        expected = []
        for di in span:
            for dj in span:
                for dk in span:
                    fixed = given["feat_fixed"][1, :, i, j, k]
                    moving = at(given["feat_moving"][1], (i + di, j + dj, k + dk), padding)
                    expected.append(fixed @ moving if similarity == "dot" else (fixed - moving).square().sum())
        torch.testing.assert_close(out[1, :, i, j, k], torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_values_fraction(backend: str) -> None:
    """A quarter of a voxel further along the last axis, by hand; outside, zeros fade in within one voxel."""
    fixed, moving = torch.full((1, 1, 1, 1, 4), 2.0), torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 1, 1, 1, 4)
    disp = torch.tensor([0.0, 0.0, 0.25]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 1, 4)

    def middle(similarity: str, padding: str) -> Tensor:  # offsets (0, 0, -1), (0, 0, 0), (0, 0, 1): (3, 4)
        options = {"similarity": similarity, "padding": padding, "backend": backend}
        return cost_volume(fixed, moving, 1, disp, **options)[0, 12:15, 0, 0]

    samples = torch.tensor([[1.0, 1.25, 2.5, 5.0], [1.25, 2.5, 5.0, 8.0], [2.5, 5.0, 8.0, 8.0]])
    torch.testing.assert_close(middle("dot", "border"), 2 * samples)
    torch.testing.assert_close(middle("ssd", "border"), (2 - samples).square())
    samples = torch.tensor([[0.25, 1.25, 2.5, 5.0], [1.25, 2.5, 5.0, 6.0], [2.5, 5.0, 6.0, 0.0]])
    torch.testing.assert_close(middle("dot", "zeros"), 2 * samples)
    torch.testing.assert_close(middle("ssd", "zeros"), (2 - samples).square())


@pytest.mark.parametrize("backend", BACKENDS)
def test_displacement_moves_the_window(backend: str) -> None:
    """A whole displacement gives the window of the voxel it points to, on a moving grid of another size."""
    fixed, moving = torch.randn(1, 4, 3, 2, 4), torch.randn(1, 4, 7, 6, 8)
    disp = torch.tensor([2.0, 3.0, 1.0]).view(1, 3, 1, 1, 1).expand(1, 3, 3, 2, 4)
    out = cost_volume(fixed, moving, 1, disp, backend=backend)
    expected = cost_volume(fixed, moving[:, :, 2:5, 3:5, 1:5], 1, backend=backend)
    torch.testing.assert_close(out[:, 13], expected[:, 13], rtol=1e-5, atol=1e-5)
    one = torch.einsum("c,cn->n", fixed[0, :, 2, 1, 3], moving[0, :, 3:6, 3:6, 3:6].flatten(1))
    torch.testing.assert_close(out[0, :, 2, 1, 3], one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("similarity", "padding"), BOTH)
@pytest.mark.parametrize(("radius", "size"), ((0, (3, 4, 5)), (1, (5, 6, 7)), (2, (6, 5, 7)), (3, (5, 1, 4))))
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
def test_lean_matches_reference(
    budget: int,
    radius: int,
    size: tuple[int, int, int],
    similarity: str,
    padding: str,
    arrange: Callable,
    assert_backends_agree: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Axes that the cubes of r + 1 voxels fill and axes that they do not.

    |f - m|^2 is expanded in float32, where the squares reach 30; the gradient sums up to 343 such terms.
    """
    monkeypatch.setattr(lean, "BLOCK", budget)
    options = {"radius": radius, "similarity": similarity, "padding": padding}
    assert_backends_agree(lambda **kw: cost_volume(**kw, **options), pair(size), arrange, atol=5e-5)


@pytest.mark.parametrize(("similarity", "padding"), BOTH)
@pytest.mark.parametrize(("radius", "size", "other"), ((0, (3, 4, 5), (3, 4, 5)), (1, (5, 3, 4), (4, 1, 6))))
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
def test_lean_matches_reference_with_disp(
    budget: int,
    radius: int,
    size: tuple[int, int, int],
    other: tuple[int, int, int],
    similarity: str,
    padding: str,
    arrange: Callable,
    assert_backends_agree: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one slab and plane by plane, from a moving grid of another size.

    lean samples by grid_sample, whose normalised coordinates carry an error of 1e-7 times the size.
    """
    monkeypatch.setattr(lean, "BUDGET", budget)
    inputs = {"feat_fixed": torch.randn(2, 5, *size), "feat_moving": torch.randn(2, 5, *other), "disp": off_grid(size)}
    options = {"radius": radius, "similarity": similarity, "padding": padding}
    assert_backends_agree(lambda **kw: cost_volume(**kw, **options), inputs, arrange, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("looked_up", (True, False), ids=("with disp", "without"))
def test_lean_keeps_its_budget(looked_up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients no buffer beside the result is larger than the budget, but for the padded features."""
    budget, size = 1 << 20, (24, 16, 16)
    monkeypatch.setattr(lean, "BUDGET" if looked_up else "BLOCK", budget)
    given = pair(size, batch=1)
    disp = off_grid(size, batch=1) if looked_up else None
    with torch.no_grad(), torch.profiler.profile(profile_memory=True, record_shapes=False) as profiler:
        out = cost_volume(**given, radius=3, disp=disp, backend="lean")
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    result = out.numel() * out.element_size()
    features = 0 if looked_up else 4 * sum(x.nbytes for x in given.values())  # channels last and padded, both
    assert result > 4 * budget and result <= peak <= result + budget + features


def test_lean_takes_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budgets above mean what they say: counted by the products and slabs that are computed."""
    given, counts = pair((5, 6, 7), batch=1), {}
    for budget in BUDGETS.values():
        monkeypatch.setattr(lean, "BUDGET", budget)
        monkeypatch.setattr(lean, "BLOCK", budget)
        products, slabs = [], []
        bmm, slab = torch.bmm, lean._lookup_slab
        with monkeypatch.context() as patch:
            patch.setattr(torch, "bmm", lambda *a, bmm=bmm, done=products: done.append(1) or bmm(*a))
            patch.setattr(lean, "_lookup_slab", lambda *a, slab=slab, done=slabs: done.append(1) or slab(*a))
            cost_volume(**given, radius=1, backend="lean")
            cost_volume(**given, radius=1, disp=off_grid((5, 6, 7), batch=1), backend="lean")
        counts[budget] = len(products), len(slabs)
    # 3 x 3 x 4 cubes of 2 voxels: a product for each of three slabs along i, or for each cube
    assert list(counts.values()) == [(3, 1), (36, 5)]


@pytest.mark.parametrize("with_disp", (False, True))
@pytest.mark.parametrize(("similarity", "padding"), BOTH)
def test_kernel_matches_reference(
    similarity: str,
    padding: str,
    with_disp: bool,
    arrange: Callable,
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward (the gradient is the lean layer's): several programs, channels in one turn and in two, odd sizes."""
    for radius, size, other, widest in ((1, (5, 3, 4), (4, 1, 6), 256), (0, (1, 3, 2), (1, 3, 2), 4)):
        monkeypatch.setattr("common.ops._triton.MAX_BLOCK", 64)
        monkeypatch.setattr(importlib.import_module("common.ops.cost_volume.kernel"), "WIDEST", widest)
        given = pair(size) if not with_disp else {"feat_fixed": torch.randn(2, 5, *size)}
        if with_disp:
            given |= {"feat_moving": torch.randn(2, 5, *other), "disp": off_grid(size, reach=3)}
        options = {"radius": radius, "similarity": similarity, "padding": padding}
        expected = cost_volume(**{k: x.double() for k, x in given.items()}, **options, backend="reference")
        out = cost_volume(**{k: arrange(x.to(kernel_device)) for k, x in given.items()}, **options, backend="triton")
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double().cpu(), expected, rtol=1e-5, atol=1e-5)


def test_kernel_radius_two(kernel_device: torch.device) -> None:
    given = pair((3, 4, 2), batch=1)
    out = cost_volume(**{k: x.to(kernel_device) for k, x in given.items()}, radius=2, backend="triton")
    torch.testing.assert_close(out.cpu(), cost_volume(**given, radius=2, backend="reference"), rtol=1e-5, atol=1e-5)


def test_kernel_gives_way_to_lean_for_gradients(
    arrange: Callable, assert_backends_agree: Callable, kernel_device: torch.device
) -> None:
    inputs = pair((3, 2, 4)) | {"disp": off_grid((3, 2, 4))}
    options = {"radius": 1, "similarity": "ssd"}
    agree = {"backend": "triton", "rtol": 1e-4, "atol": 5e-5}  # as lean above
    assert_backends_agree(lambda **kw: cost_volume(**kw, **options), inputs, arrange, **agree)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("with_disp", (False, True))
def test_kernel_half(with_disp: bool, dtype: torch.dtype, kernel_device: torch.device) -> None:
    """On the same numbers, half inputs round the result once."""
    given = pair((3, 2, 4), batch=1) | ({"disp": off_grid((3, 2, 4), batch=1)} if with_disp else {})
    given = {k: x.to(kernel_device, dtype) for k, x in given.items()}
    out = cost_volume(**given, radius=1, backend="triton")
    assert out.dtype == dtype
    expected = cost_volume(**{k: x.float() for k, x in given.items()}, radius=1, backend="triton")
    torch.testing.assert_close(out.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_kernel_opcheck(kernel_device: torch.device) -> None:
    importlib.import_module("common.ops.cost_volume.kernel")  # registers the operator
    given = [
        x.to(kernel_device) for x in (*pair((2, 3, 2), batch=1, channels=3).values(), off_grid((2, 3, 2), batch=1))
    ]
    for disp in (None, given[2]):
        arguments = (*given[:2], disp, 0, True, True)
        torch.library.opcheck(torch.ops.monai_registration.cost_volume_triton.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("similarity", "padding"), KINDS)
@pytest.mark.parametrize("with_disp", (False, True))
def test_gradcheck(with_disp: bool, similarity: str, padding: str, backend: str) -> None:
    inputs = [*pair((2, 3, 2), batch=1, channels=2).values(), *([off_grid((2, 3, 2), batch=1)] if with_disp else [])]
    leaves = [x.double().requires_grad_() for x in inputs]

    def run(fixed: Tensor, moving: Tensor, disp: Tensor | None = None) -> Tensor:
        return cost_volume(fixed, moving, 1, disp, similarity=similarity, padding=padding, backend=backend)

    # a random direction of the Jacobian; all its 324 rows would take minutes
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("ssd", (False, True))
def test_opcheck(ssd: bool) -> None:
    fixed, moving = (x.requires_grad_() for x in pair((3, 4, 5), channels=3).values())
    torch.library.opcheck(torch.ops.monai_registration.cost_volume.default, (fixed, moving, 1, ssd, True))
    arguments = (torch.randn(2, 27, 3, 4, 5), fixed.detach(), moving.detach(), 1, ssd, True)
    torch.library.opcheck(torch.ops.monai_registration.cost_volume_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("with_disp", (False, True))
def test_keeps_dtype(with_disp: bool, dtype: torch.dtype, backend: str) -> None:
    """The result is rounded to half, the sums are not."""
    given = pair((3, 4, 5)) | ({"disp": off_grid((3, 4, 5))} if with_disp else {})
    given = {k: x.to(dtype) for k, x in given.items()}
    out = cost_volume(**given, radius=1, similarity="ssd", backend=backend)
    assert out.dtype == dtype
    expected = cost_volume(**{k: x.float() for k, x in given.items()}, radius=1, similarity="ssd")
    torch.testing.assert_close(out.float(), expected, rtol=torch.finfo(dtype).eps, atol=5e-5)


FEAT, DISP = torch.zeros(2, 4, 3, 4, 5), torch.zeros(2, 3, 3, 4, 5)


@pytest.mark.parametrize(
    ("change", "text"),
    (
        ({"feat_fixed": FEAT[0]}, r"'feat_fixed' must have shape \(B, C, I, J, K\), got \(4, 3, 4, 5\)"),
        ({"feat_fixed": FEAT.long()}, r"'feat_fixed' must be floating point, got torch.int64"),
        ({"feat_moving": FEAT[:, :3]}, r"'feat_moving' must have 4 channels, got 3"),
        (
            {"feat_moving": FEAT[..., :2]},
            r"'feat_moving' must share batch and grid \(2, 3, 4, 5\) with 'feat_fixed', got \(2, 3, 4, 2\)",
        ),
        ({"feat_moving": FEAT[:1], "disp": DISP}, r"'feat_moving' must have batch 2, got 1"),
        ({"disp": DISP[:, :2]}, r"'disp' must have 3 channels, got 2"),
        (
            {"disp": DISP[:, :, :2]},
            r"'disp' must share batch and grid \(2, 3, 4, 5\) with 'feat_fixed', got \(2, 2, 4, 5\)",
        ),
        ({"feat_moving": FEAT.to("meta")}, r"'feat_moving' must be on the device of 'feat_fixed' \(cpu\), got meta"),
        ({"disp": DISP.to("meta")}, r"'disp' must be on the device of 'feat_fixed' \(cpu\), got meta"),
        (
            {"feat_moving": FEAT.to("meta"), "disp": DISP},
            r"'feat_moving' must be on the device of 'feat_fixed' \(cpu\), got meta",
        ),
        ({"radius": -1}, r"'radius' must be >= 0, got -1"),
        ({"radius": 1.0}, r"'radius' must be >= 0, got 1.0"),
        ({"similarity": "ncc"}, r"'similarity' must be one of \('dot', 'ssd'\), got 'ncc'"),
        ({"padding": "reflection"}, r"'padding' must be one of \('border', 'zeros'\), got 'reflection'"),
    ),
)
def test_rejects(change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=r"cost_volume\(\) " + text):
        cost_volume(**({"feat_fixed": FEAT, "feat_moving": FEAT, "radius": 1} | change))


def test_rejects_backend(refused: Callable) -> None:
    refused(cost_volume, {"feat_fixed": FEAT, "feat_moving": FEAT, "radius": 1})


GOLDEN_BACKENDS = ("lean", pytest.param("triton", marks=pytest.mark.gpu))


def golden(development_data: Path, backend: str) -> tuple[dict[str, np.ndarray], Tensor, Tensor]:
    device = "cuda" if backend == "triton" else "cpu"
    parts = np.load(development_data / "golden" / "convex_parts.npz")
    return parts, *(torch.from_numpy(parts[name])[None].to(device) for name in ("feat_fixed", "feat_moving"))


@pytest.mark.parametrize("backend", GOLDEN_BACKENDS)
def test_golden_samconvex(backend: str, development_data: Path) -> None:
    """SAMConvex: -(1 - ssd / 2) over the repeated border, offsets as here; and its first arg-min at radius 3."""
    parts, fixed, moving = golden(development_data, backend)
    ssd = cost_volume(fixed, moving, 2, similarity="ssd", backend=backend)[0].cpu()
    torch.testing.assert_close(-(1 - 0.5 * ssd), torch.from_numpy(parts["sam_cost_n2"]), rtol=0, atol=2e-6)
    best = cost_volume(fixed, moving, 3, similarity="ssd", backend=backend)[0].argmin(0).cpu()
    assert torch.equal(best.short(), torch.from_numpy(parts["sam_argmin_n3"]))


@pytest.mark.parametrize("backend", GOLDEN_BACKENDS)
def test_golden_convexadam(backend: str, development_data: Path) -> None:
    """convexAdam: zeros outside, the first axis fastest in the order of offsets, and two box means on top."""
    parts, fixed, moving = golden(development_data, backend)
    ssd = cost_volume(fixed, moving, 2, similarity="ssd", padding="zeros", backend=backend).cpu()
    ssd = ssd.unflatten(1, (5, 5, 5)).permute(0, 3, 2, 1, 4, 5, 6).flatten(1, 3)
    for _ in range(2):
        ssd = F.avg_pool3d(ssd, 3, stride=1, padding=1)
    torch.testing.assert_close(ssd[0, 62], torch.from_numpy(parts["cvx_ssd_hw2_center"]), rtol=0, atol=2e-6)
    thinned = ssd[0, :, ::2, ::2, ::2]
    torch.testing.assert_close(thinned, torch.from_numpy(parts["cvx_ssd_hw2_every2"]), rtol=0, atol=2e-6)
