"""kmeans: known clusters, rules for empty clusters and ties, determinism, and how good the capped default is."""

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.ops import kmeans
from common.ops.kmeans import lean
from common.ops.kmeans.reference import spread_start

BACKENDS = ("reference", "lean")
STARTS = ("spread", "even")


def blobs(batch: int = 2, clusters: int = 4, each: int = 50, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Points (B, P, C) in shuffled, well separated groups, and the group of each."""
    centres = 20 * torch.eye(max(clusters, channels))[:clusters, :channels]
    centres = centres + 40 * torch.arange(clusters).view(-1, 1)
    group = torch.stack([torch.randperm(clusters * each) % clusters for _ in range(batch)])
    return centres[group] + torch.randn(batch, clusters * each, channels), group


def scatter(points: Tensor, labels: Tensor) -> float:
    """Within-cluster sum of squared distances to the clusters' own means, in float64."""
    x, total = points[0].double(), 0.0
    for n in labels.unique():
        members = x[labels[0] == n]
        total += float((members - members.mean(0)).square().sum())
    return total


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_values(backend: str) -> None:
    """Two pairs on a line, from given starts: worked out by hand."""
    points = torch.tensor([[[0.0], [1.0], [10.0], [13.0]]])
    labels, centroids = kmeans(points, 2, 1, torch.tensor([[[0.0], [6.0]]]), backend=backend)
    assert labels.tolist() == [[0, 0, 1, 1]] and labels.dtype == torch.int64
    torch.testing.assert_close(centroids, torch.tensor([[[0.5], [11.5]]]))
    # no step: the start is returned, and ties go to the lower index
    labels, centroids = kmeans(points, 2, 0, torch.tensor([[[0.0], [2.0]]]), backend=backend)
    assert labels.tolist() == [[0, 0, 1, 1]] and centroids.flatten().tolist() == [0.0, 2.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("iterations", (10, None))
def test_known_clusters(iterations: int | None, init: str, backend: str) -> None:
    """A label for each group and back; "even" may start twice in one group, so its points come group by group."""
    points, group = blobs()
    if init == "even":
        order = group.argsort(1)
        points, group = points.gather(1, order.unsqueeze(2).expand_as(points)), group.gather(1, order)
    labels, centroids = kmeans(points, 4, iterations, init, backend=backend)
    for b in range(2):
        pairs = set(zip(labels[b].tolist(), group[b].tolist()))
        assert len(pairs) == 4
        for label, g in pairs:
            torch.testing.assert_close(centroids[b, label], points[b][group[b] == g].mean(0), rtol=1e-5, atol=1e-4)


def test_even_start() -> None:
    points = torch.randn(2, 23, 3)
    _, centroids = kmeans(points, 7, 0, "even")
    assert torch.equal(centroids, points[:, [int((n + 0.5) * 23 / 7) for n in range(7)]])


def test_spread_start() -> None:
    """Starts are points; the first is the nearest to the mean, and separated groups get one each."""
    points, group = blobs(batch=1, clusters=7, channels=7)
    _, starts = kmeans(points, 7, 0, "spread")
    index = [int((points[0] == start).all(1).nonzero()) for start in starts[0]]
    assert index[0] == int((points - points.mean(1, keepdim=True)).square().sum(2).argmin())
    assert len(set(index)) == 7
    assert len(set(group[0, index].tolist())) >= 6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iterations", (10, None))
def test_repeatable(iterations: int | None, backend: str) -> None:
    points = torch.randn(2, 20_001 if iterations else 2_001, 5)
    first, second = (kmeans(points.clone(), 7, iterations, backend=backend) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_cluster(backend: str) -> None:
    """A start that wins no point becomes the zero vector, and from there it may win points back."""
    points = torch.tensor([[[4.0, 0.0], [5.0, 0.0], [11.0, 0.0], [12.0, 0.0]]])
    starts = torch.tensor([[[4.5, 0.0], [11.5, 0.0], [90.0, 90.0]]])
    labels, centroids = kmeans(points, 3, 3, starts, backend=backend)
    assert labels.tolist() == [[0, 0, 1, 1]]
    assert centroids[0, 2].tolist() == [0.0, 0.0]
    back = torch.cat([points, torch.tensor([[[1.0, 0.0]]])], 1)
    labels, centroids = kmeans(back, 3, 3, starts, backend=backend)
    assert labels.tolist() == [[0, 0, 1, 1, 2]]
    assert centroids[0].tolist() == [[4.5, 0.0], [11.5, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_points(backend: str) -> None:
    """Fewer distinct points than clusters: one cluster takes them all, the others are empty; nothing is NaN."""
    labels, centroids = kmeans(torch.full((1, 9, 2), 3.0), 4, None, backend=backend)
    assert labels.unique().numel() == 1
    assert sorted(centroids[0].tolist()) == [[0.0, 0.0]] * 3 + [[3.0, 3.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_init_tensor(backend: str) -> None:
    """Clusters keep the order of their starts."""
    points, group = blobs(batch=1)
    means = torch.stack([points[0][group[0] == n].mean(0) for n in range(4)])
    order = torch.tensor([2, 0, 3, 1])
    labels, centroids = kmeans(points, 4, 5, means[order].unsqueeze(0), backend=backend)
    torch.testing.assert_close(centroids[0], means[order], rtol=1e-5, atol=1e-4)
    assert torch.equal(order[labels[0]], group[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("init", STARTS)
def test_fixed_point(init: str, backend: str) -> None:
    """iterations=None ends where one more step changes nothing."""
    points = torch.randn(2, 500, 3)
    labels, centroids = kmeans(points, 5, None, init, backend=backend)
    more, moved = kmeans(points, 5, 1, centroids, backend=backend)
    assert torch.equal(labels, more)
    torch.testing.assert_close(centroids, moved, rtol=0, atol=1e-5)
    assert not torch.equal(labels, kmeans(points, 5, 1, init, backend=backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iterations", (0, 1, 3, None))
@pytest.mark.parametrize("sample", (None, 600))
def test_labels_belong_to_centroids(sample: int | None, iterations: int | None, backend: str) -> None:
    """Every label is the nearest of the returned centroids, also where Lloyd has not converged."""
    points = torch.randn(2, 2_500, 4)
    labels, centroids = kmeans(points, 6, iterations, sample=sample, backend=backend)
    distance = torch.cdist(points.double(), centroids.double())
    own = distance.gather(2, labels.unsqueeze(2)).squeeze(2)
    assert (own - distance.min(2).values).max() <= 1e-5


@pytest.mark.parametrize("block", (16384, 100))
@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("iterations", (0, 10))
def test_lean_matches_reference(iterations: int, init: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels equal and centroids close, from strided points too; float64, so that no near tie can flip."""
    monkeypatch.setattr(lean, "BLOCK", block)
    points = torch.randn(6, 1_001, 2, dtype=torch.float64).permute(2, 1, 0)
    results = [kmeans(points, 7, iterations, init, sample=300, backend=backend) for backend in BACKENDS]
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("count", "block", "chunks"), ((301, 256, 512), (517, 64, 3), (5, 256, 512)))
@pytest.mark.parametrize("init", STARTS)
def test_kernel_matches_reference(
    init: str, count: int, block: int, chunks: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels equal and centroids close, from strided points; tiles that are not full, alone and several a program."""
    monkeypatch.setattr("common.ops._triton.MAX_BLOCK", block)
    monkeypatch.setattr(importlib.import_module("common.ops.kmeans.kernel"), "PARTIALS", chunks * 16 * 16)
    points = torch.randn(17, count, 2).permute(2, 1, 0)
    labels, centroids = kmeans(points.to(kernel_device), 5, 2, init, sample=100, backend="triton")
    expected = kmeans(points.double(), 5, 2, init, sample=100, backend="reference")
    assert torch.equal(labels.cpu(), expected[0]) and labels.dtype == torch.int64
    torch.testing.assert_close(centroids.double().cpu(), expected[1], rtol=1e-5, atol=1e-5)


def test_kernel_ties_and_empty_clusters(kernel_device: torch.device) -> None:
    """As test_known_values and test_empty_cluster."""
    points = torch.tensor([[[0.0], [1.0], [10.0], [13.0]]], device=kernel_device)
    labels, _ = kmeans(points, 2, 0, torch.tensor([[[0.0], [2.0]]], device=kernel_device), backend="triton")
    assert labels.tolist() == [[0, 0, 1, 1]]
    starts = torch.tensor([[[0.5], [11.5], [-90.0]]], device=kernel_device)
    labels, centroids = kmeans(points, 3, 1, starts, backend="triton")
    assert labels.tolist() == [[2, 0, 1, 1]] and centroids.flatten().tolist() == [0.5, 11.5, 0.0]


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_kernel_half(dtype: torch.dtype, kernel_device: torch.device) -> None:
    points = torch.randn(2, 300, 3).to(kernel_device, dtype)
    labels, centroids = kmeans(points, 4, 2, backend="triton")
    expected = kmeans(points.float(), 4, 2, backend="triton")
    assert centroids.dtype == dtype
    assert torch.equal(labels, expected[0]) and torch.equal(centroids, expected[1].to(dtype))


@pytest.mark.parametrize("layer", ("lean", "triton"))
def test_kernel_labels_of_nan(layer: str, kernel_device: torch.device) -> None:
    """A point that is NaN has a label in range all the same: on a GPU argmax of NaN alone is the last of 16 columns."""
    points = torch.randn(1, 40, 3, device=kernel_device)
    points[0, 7] = float("nan")
    labels, _ = kmeans(points, 5, 3, backend=layer)
    assert labels.min() >= 0 and labels.max() <= 4


@pytest.mark.parametrize("number", (3, 7))
def test_kernel_starts(number: int, kernel_device: torch.device) -> None:
    """The same points as the reference starts from, also across tiles and of a sample."""
    kernel = importlib.import_module("common.ops.kmeans.kernel")
    points = torch.randn(2, 700, 4)
    found = kernel.spread_start_triton(points.to(kernel_device), number, 3)
    assert torch.equal(found.cpu(), spread_start(points[:, ::3], number))


def test_reads_sample_in_place(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch an iteration, one for the labels, and no copy of the points."""
    kernel = importlib.import_module("common.ops.kmeans.kernel")
    launches = []

    class Counted:
        def __getitem__(self, grid: tuple) -> Callable:
            def launch(points: Tensor, *rest: object, **options: object) -> None:
                launches.append(points.data_ptr())
                inner[grid](points, *rest, **options)

            return launch

    inner = kernel.assign_kernel
    monkeypatch.setattr(kernel, "assign_kernel", Counted())
    points = torch.randn(1, 300, 3, device=kernel_device)
    kmeans(points, 4, 5, sample=100, backend="triton")
    assert launches == [points.data_ptr()] * (5 + 2 + 1)


def test_kernel_opcheck(kernel_device: torch.device) -> None:
    importlib.import_module("common.ops.kmeans.kernel")  # registers the operator
    points, centroids = torch.randn(2, 20, 3, device=kernel_device), torch.randn(2, 4, 3, device=kernel_device)
    torch.library.opcheck(torch.ops.monai_registration.kmeans_assign_triton.default, (points, centroids))
    torch.library.opcheck(torch.ops.monai_registration.kmeans_lloyd_triton.default, (points, centroids, 2, 2))
    torch.library.opcheck(torch.ops.monai_registration.kmeans_start_triton.default, (points, 3, 2))


def sacb_points(kind: str) -> Tensor:
    """What a SACB clusters, (1, 64000, 16): normalised 3x3x3 means of noisy regions, or of a smooth random field."""
    size, channels = (40, 40, 40), 16
    if kind == "regions":
        seeds, level = torch.rand(12, 3) * 40, torch.randn(12, channels)
        grid = torch.stack(torch.meshgrid(*[torch.arange(40.0)] * 3, indexing="ij"), -1).view(-1, 3)
        region = torch.cdist(grid, seeds).argmin(1)
        volume = (level[region] + 0.7 * torch.randn(region.numel(), channels)).t().view(1, channels, *size)
    else:
        volume = F.interpolate(torch.randn(1, channels, 6, 6, 6), size=size, mode="trilinear", align_corners=True)
    volume = F.avg_pool3d(F.instance_norm(volume), 3, stride=1, padding=1)
    return volume.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("kind", "same_start", "best_start"), (("regions", 1.01, 1.25), ("smooth", 1.01, 1.01)))
def test_quality(kind: str, same_start: float, best_start: float) -> None:
    """The default, capped and on a sample, against every point to the fixed point, by within-cluster scatter.

    The first bound is for the same start, so it holds the cap and the sample; the second for the best of three
    random starts, so it holds the start too, which matters more: regions have poor local optima. Measured over five
    seeds: 1.00 to 1.12 and 1.04 to 1.29 for regions, 1.001 to 1.004 and 1.00 to 1.01 for smooth fields.
    """
    points = sacb_points(kind)
    stride = points.shape[1] // 8192
    assert stride > 1  # so that the default does draw a sample
    capped = scatter(points, kmeans(points, 7)[0])
    start = kmeans(points[:, ::stride], 7, 0)[1]
    assert capped <= same_start * scatter(points, kmeans(points, 7, None, start)[0])
    starts = [points[:, torch.randperm(points.shape[1])[:7]] for _ in range(3)]
    best = min(scatter(points, kmeans(points, 7, None, start)[0]) for start in starts)
    assert capped <= best_start * best
    assert best < 0.8 * scatter(points, kmeans(points, 1)[0])  # there are clusters to find


def test_no_gradient() -> None:
    points = torch.randn(1, 30, 2, requires_grad=True)
    labels, centroids = kmeans(points, 3)
    assert not centroids.requires_grad and not labels.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_keeps_dtype(dtype: torch.dtype, backend: str) -> None:
    points, _ = blobs()
    points = (points / 40).to(dtype)
    labels, centroids = kmeans(points, 4, backend=backend)
    assert centroids.dtype == dtype and labels.dtype == torch.int64
    expected = kmeans(points.float(), 4, backend=backend)
    assert torch.equal(labels, expected[0])
    torch.testing.assert_close(centroids.float(), expected[1], rtol=1e-2, atol=1e-2)


POINTS = torch.zeros(2, 10, 3)


@pytest.mark.parametrize(
    ("change", "text"),
    (
        ({"points": POINTS[0]}, r"'points' must have shape \(B, P, C\), got \(10, 3\)"),
        ({"points": POINTS.long()}, r"'points' must be floating point, got torch.int64"),
        ({"clusters": 0}, r"'clusters' must be from 1 to the number of points 10, got 0"),
        ({"clusters": 11}, r"'clusters' must be from 1 to the number of points 10, got 11"),
        ({"iterations": -1}, r"'iterations' must be >= 0 or None, got -1"),
        ({"sample": 3}, r"'sample' must be >= clusters 4, got 3"),
        ({"init": "random"}, r"'init' must be a tensor or one of \('spread', 'even'\), got 'random'"),
        ({"init": torch.zeros(2, 3, 3)}, r"'init' must have shape \(2, 4, 3\), got \(2, 3, 3\)"),
    ),
)
def test_rejects(change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=r"kmeans\(\) " + text):
        kmeans(**({"points": POINTS, "clusters": 4} | change))


def test_rejects_backend(refused: Callable) -> None:
    refused(kmeans, {"points": POINTS, "clusters": 4})
