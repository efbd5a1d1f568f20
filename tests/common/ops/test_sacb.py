"""modulated_conv3d and the SACB block: formula, gradients, clustering, and life in somebody else's network."""

import importlib
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.ops import SACB, _patches, modulated_conv3d
from common.ops.sacb import Clusters, box_mean
from common.ops.sacb.half import half_weight_gradients

BACKENDS = ("reference", "lean")
BLOCKS = {"one block": 1 << 19, "planes": 27 * 4 * 80, "rows": 27 * 4 * 16}
TAPS = list(itertools.product((-1, 0, 1), repeat=3))


def arguments(
    size: tuple[int, int, int] = (5, 7, 9), *, batch: int = 2, channels: int = 4, out: int = 3, clusters: int = 5
) -> dict[str, Tensor]:
    return {
        "x": torch.randn(batch, channels, *size),
        "weight": 0.2 * torch.randn(out, channels, 3, 3, 3),
        "bias": torch.randn(batch, clusters, out),
        "modulation": torch.rand(batch, clusters, 27),
        "labels": torch.randint(clusters, (batch, *size)),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_values_plain(backend: str) -> None:
    """With all taps at 1 it is an ordinary convolution plus the bias of the voxel's cluster."""
    given = arguments() | {"modulation": torch.ones(2, 5, 27)}
    expected = F.conv3d(given["x"], given["weight"], padding=1)
    for b in range(2):
        expected[b] += given["bias"][b].t()[:, given["labels"][b]]
    torch.testing.assert_close(modulated_conv3d(**given, backend=backend), expected, rtol=1e-5, atol=1e-5)


def test_half_weight_gradients() -> None:
    """By a plain convolution of the gradient, kept apart by clusters, of which one is empty; digits of bfloat16."""
    given = arguments((6, 5, 8), channels=4, out=3, clusters=5)
    given["labels"].clamp_(max=3)
    names, grad = ("weight", "bias", "modulation"), torch.randn(2, 3, 6, 5, 8)
    leaves = {name: given[name].requires_grad_() for name in names}
    exact = torch.autograd.grad(modulated_conv3d(**given, backend="reference"), leaves.values(), grad)
    with torch.no_grad():
        found = half_weight_gradients(grad, given["x"], given["weight"], given["modulation"], given["labels"])
    for name, value, expected in zip(names, found, exact):
        assert value.shape == expected.shape and value.dtype == torch.float32, name
        assert (value - expected).norm() < 5e-3 * expected.norm(), name
    assert not found[1][:, 4].any() and not found[2][:, 4].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tap", (0, 1, 5, 13, 15, 26))
def test_known_values_taps(tap: int, backend: str) -> None:
    """Taps are ordered i, j, k: cluster 1 keeps one tap and so reads one neighbour; cluster 0 reads nothing."""
    x = torch.randn(1, 1, 4, 5, 6)
    labels = torch.zeros(1, 4, 5, 6, dtype=torch.int64)
    labels[..., 3:] = 1
    modulation = torch.zeros(1, 2, 27)
    modulation[0, 1, tap] = 2.0
    bias = torch.tensor([[[-1.0], [7.0]]])
    out = modulated_conv3d(x, torch.ones(1, 1, 3, 3, 3), bias, modulation, labels, backend=backend)
    i, j, k = TAPS[tap]
    neighbour = F.pad(x, (1,) * 6)[:, :, 1 + i : 5 + i, 1 + j : 6 + j, 1 + k : 7 + k]
    torch.testing.assert_close(out, torch.where(labels.bool(), 2 * neighbour + 7, -torch.ones_like(x)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_values_sum(backend: str) -> None:
    """Eq. 5-6 at one voxel of the second sample, at the border: W_n = a_n W, zeros outside."""
    given = arguments()
    n = int(given["labels"][1, 0, 3, 8])
    patch = F.pad(given["x"][1], (1,) * 6)[:, 0:3, 3:6, 8:11]
    kernel = given["weight"] * given["modulation"][1, n].view(3, 3, 3)
    expected = (kernel * patch).sum((1, 2, 3, 4)) + given["bias"][1, n]
    out = modulated_conv3d(**given, backend=backend)
    torch.testing.assert_close(out[1, :, 0, 3, 8], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
def test_lean_matches_reference(
    block: int, arrange: Callable, assert_backends_agree: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_patches, "BLOCK_FLOATS", block)
    assert_backends_agree(modulated_conv3d, arguments(), arrange)


@pytest.mark.parametrize("size", ((5, 1, 1), (1, 5, 1), (1, 1, 5), (2, 1, 3), (1, 1, 1)))
def test_lean_on_thin_grids(size: tuple[int, int, int], arrange: Callable, assert_backends_agree: Callable) -> None:
    """The windows of a line of voxels overlap in memory, which a gradient must not write to."""
    assert_backends_agree(modulated_conv3d, arguments(size), arrange)


@pytest.mark.parametrize("clusters", (1, 9))
def test_lean_matches_reference_clusters(clusters: int, arrange: Callable, assert_backends_agree: Callable) -> None:
    """One cluster; and more than occur in the labels, whose gradients are zero."""
    given = arguments((3, 5, 4), clusters=clusters)
    given["labels"] %= 4
    given["labels"] = given["labels"].int()
    assert_backends_agree(modulated_conv3d, given, arrange)


KERNEL_CASES = {
    "several programs": ({"size": (3, 5, 4), "channels": 5, "out": 3}, 32),
    "one voxel wide, more outputs": ({"size": (4, 1, 5), "channels": 3, "out": 17, "clusters": 9}, 256),
    "a line of voxels": ({"size": (5, 1, 1), "channels": 3, "out": 4}, 256),
    "one cluster": ({"size": (3, 2, 2), "channels": 17, "out": 4, "clusters": 1, "batch": 1}, 256),
}


@pytest.mark.parametrize(("sizes", "block"), KERNEL_CASES.values(), ids=KERNEL_CASES.keys())
def test_kernel_matches_reference(
    sizes: dict,
    block: int,
    arrange: Callable,
    assert_backends_agree: Callable,
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """C != O, in one tile of 16 and in two; a cluster without voxels; blocks that are not full, several a program.

    A weight gradient sums 120 products of which some reach 10; float32 keeps 1e-6 of that.
    """
    monkeypatch.setattr("common.ops._triton.MAX_BLOCK", block)
    monkeypatch.setattr("common.ops.sacb.kernel.PROGRAMS", 6)
    monkeypatch.setattr("common.ops.sacb.kernel.BLOCK_GRAD", 16)
    monkeypatch.setattr("common.ops.sacb.kernel.WIDEST", 16)
    monkeypatch.setattr("common.ops.sacb.kernel.WIDEST_GRAD", 16)
    given = arguments(**sizes)
    given["labels"] = given["labels"].clamp(max=max(given["modulation"].shape[1] - 2, 0)).int()
    assert_backends_agree(modulated_conv3d, given, arrange, backend="triton", rtol=1e-5, atol=3e-5)


def test_kernel_half(assert_half_kernel_agrees: Callable) -> None:
    assert_half_kernel_agrees(modulated_conv3d, arguments((3, 2, 4), batch=1))


def test_kernel_opcheck(kernel_device: torch.device) -> None:
    importlib.import_module("common.ops.sacb.kernel")  # registers the operators
    given = {k: x.to(kernel_device) for k, x in arguments((2, 3, 2), batch=1, channels=2, out=3, clusters=2).items()}
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in given.values()]
    torch.library.opcheck(torch.ops.monai_registration.modulated_conv3d_triton.default, leaves)
    grad = torch.randn(1, 3, 2, 3, 2, device=kernel_device)
    backward = (grad, *(x.detach() for x in leaves))
    torch.library.opcheck(torch.ops.monai_registration.modulated_conv3d_triton_backward.default, backward)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    given = arguments((2, 3, 2), channels=2, out=2, clusters=3)
    labels = given.pop("labels")
    leaves = [x.double().requires_grad_() for x in given.values()]
    assert torch.autograd.gradcheck(lambda *a: modulated_conv3d(*a, labels, backend=backend), leaves)


def test_opcheck() -> None:
    given = arguments((3, 4, 5))
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in given.values()]
    torch.library.opcheck(torch.ops.monai_registration.modulated_conv3d.default, leaves)
    x, weight, _, modulation, labels = (x.detach() for x in leaves)
    backward = (torch.randn(2, 3, 3, 4, 5), x, weight, modulation, labels)
    torch.library.opcheck(torch.ops.monai_registration.modulated_conv3d_backward.default, backward)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_keeps_dtype(dtype: torch.dtype, backend: str) -> None:
    given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in arguments((3, 4, 5)).items()}
    out = modulated_conv3d(**given, backend=backend)
    assert out.dtype == dtype
    full = {k: x.float() if x.is_floating_point() else x for k, x in given.items()}
    torch.testing.assert_close(out.float(), modulated_conv3d(**full), rtol=2e-2, atol=5e-2)


GIVEN = {
    "x": torch.zeros(2, 4, 3, 4, 5),
    "weight": torch.zeros(6, 4, 3, 3, 3),
    "bias": torch.zeros(2, 7, 6),
    "modulation": torch.zeros(2, 7, 27),
    "labels": torch.zeros(2, 3, 4, 5, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("name", "value", "text"),
    (
        ("x", GIVEN["x"][0], r"'x' must have shape \(B, C, I, J, K\), got \(4, 3, 4, 5\)"),
        ("x", GIVEN["x"].int(), r"'x' must be floating point, got torch.int32"),
        ("weight", GIVEN["weight"][:, :3], r"'weight' must have shape \(O, 4, 3, 3, 3\), got \(6, 3, 3, 3, 3\)"),
        ("weight", GIVEN["weight"].flatten(2), r"'weight' must have shape \(O, 4, 3, 3, 3\), got \(6, 4, 27\)"),
        ("modulation", GIVEN["modulation"][..., :9], r"'modulation' must have shape \(2, N, 27\), got \(2, 7, 9\)"),
        ("modulation", GIVEN["modulation"][:1], r"'modulation' must have shape \(2, N, 27\), got \(1, 7, 27\)"),
        ("bias", GIVEN["bias"][:, :5], r"'bias' must have shape \(2, 7, 6\), got \(2, 5, 6\)"),
        ("labels", GIVEN["labels"][:, :2], r"'labels' must have shape \(2, 3, 4, 5\), got \(2, 2, 4, 5\)"),
        ("labels", GIVEN["labels"].float(), r"'labels' must be integer, got torch.float32"),
        ("labels", GIVEN["labels"].bool(), r"'labels' must be integer, got torch.bool"),
    ),
)
def test_rejects(name: str, value: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=r"modulated_conv3d\(\) " + text):
        modulated_conv3d(**(GIVEN | {name: value}))


def test_rejects_backend(refused: Callable) -> None:
    refused(modulated_conv3d, GIVEN)


def points_of(features: Tensor, mean_type: str) -> Tensor:
    """What eq. 2-3 cluster, patch by patch: (B, P, C), (B, P, 27) or both side by side."""
    patches = F.pad(features, (1,) * 6).unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)
    patches = patches.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(5).flatten(1, 3)  # (B, P, C, 27)
    spatial, channel = patches.mean(3), patches.mean(2)
    return {"s": spatial, "c": channel, "mix": torch.cat([spatial, channel], 2)}[mean_type]


@pytest.mark.parametrize("size", ((5, 7, 4), (1, 3, 2)))
def test_box_mean(size: tuple[int, int, int]) -> None:
    x = torch.randn(2, 3, *size)
    expected = F.conv3d(x, torch.full((3, 1, 3, 3, 3), 1 / 27), padding=1, groups=3)
    torch.testing.assert_close(box_mean(x), expected)


@pytest.mark.parametrize("mean_type", ("s", "c", "mix"))
def test_cluster_points(mean_type: str) -> None:
    """Every centroid is the mean of the points of its label; labels lie on the grid of the features."""
    features = torch.randn(2, 6, 4, 5, 3)
    block = SACB(6, clusters=4, mean_type=mean_type, iterations=None)
    labels, centroids = block.cluster(features)
    assert labels.shape == (2, 4, 5, 3)
    points = points_of(features, mean_type)
    for b, n in itertools.product(range(2), range(4)):
        mean = points[b][labels[b].flatten() == n].mean(0)
        torch.testing.assert_close(centroids[b, n], mean, rtol=1e-4, atol=1e-5)


def test_forward_formula() -> None:
    """Eq. 2-7 with given clusters: residual on x itself, sigmoid on the taps, LeakyReLU 0.1."""
    block, x = SACB(6, clusters=3), torch.randn(2, 6, 4, 3, 5)
    clusters = Clusters(torch.randint(3, (2, 4, 3, 5)), torch.randn(2, 3, 6))
    features = F.leaky_relu(F.instance_norm(block.proj_in(x)), 0.1)
    sac = modulated_conv3d(
        features,
        block.weight,
        block.bias_mlp(clusters.centroids),
        block.kernel_mlp(clusters.centroids),
        clusters.labels,
        backend="reference",
    )
    torch.testing.assert_close(block(x, clusters), x + F.leaky_relu(sac, 0.1), rtol=1e-4, atol=1e-5)


def test_parameters_independent_of_clusters() -> None:
    shapes = [{k: v.shape for k, v in SACB(8, clusters=n).state_dict().items()} for n in (1, 5, 9)]
    assert shapes[0] == shapes[1] == shapes[2]
    block, x = SACB(8, clusters=7), torch.randn(1, 8, 4, 4, 4)
    before = block(x)
    block.clusters = 3
    assert not torch.equal(before, block(x))
    assert int(block.cluster(x).labels.max()) == 2


def test_fewer_voxels_than_clusters() -> None:
    out = SACB(4, clusters=7)(torch.randn(2, 4, 1, 2, 2))
    assert out.shape == (2, 4, 1, 2, 2) and torch.isfinite(out).all()


@pytest.mark.parametrize("mean_type", ("s", "c", "mix"))
def test_lean_matches_reference_block(mean_type: str) -> None:
    """The whole block, on features with clear clusters; the gradient to every parameter by name."""
    x = 3 * torch.randn(2, 4, 1, 1, 1) + torch.randn(2, 4, 5, 7, 6)
    x[:, :2, 3:] += 6
    block = SACB(4, clusters=3, mean_type=mean_type).double()
    results = []
    for backend in BACKENDS:
        block.backend = backend
        block.zero_grad()
        out = block(x.double())
        out.square().mean().backward()
        results.append({"output": out.detach()} | {k: p.grad.clone() for k, p in block.named_parameters()})
    for name, expected in results[0].items():
        text = f"{name} differs between the reference and the lean layer"
        torch.testing.assert_close(results[1][name], expected, rtol=1e-9, atol=1e-9, msg=text)


@pytest.mark.parametrize("mean_type", ("s", "c", "mix"))
def test_drops_into_any_network(mean_type: str) -> None:
    """In a plain encoder it trains a step: finite gradients everywhere, to its MLPs above zero, and a lower loss."""
    net = nn.Sequential(
        nn.Conv3d(1, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        SACB(6, clusters=4, mean_type=mean_type),
        nn.Conv3d(6, 5, 1),
        SACB(5, clusters=2, mean_type=mean_type),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(5, 2),
    )
    x, target = torch.randn(4, 1, 9, 10, 11), torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    before = F.cross_entropy(net(x), target)
    before.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert "mlp" not in name or parameter.grad.abs().max() > 0, name
    optimizer.step()
    assert F.cross_entropy(net(x), target) < before


def test_rejects_mean_type() -> None:
    with pytest.raises(ValueError, match=r"SACB\(\) 'mean_type' must be one of \('s', 'c', 'mix'\), got 'x'"):
        SACB(4, mean_type="x")
