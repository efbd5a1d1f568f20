"""The cases of bench_operators.py: how to build each, what it has to move and compute, and what is asked of it."""

import warnings
from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from bench_sacb_net import network, phantom_image  # also puts the repository on the import path
from torch import Tensor

from common.losses import RegistrationLoss, lncc
from common.ops import cost_volume, kmeans, match, modulated_conv3d, norm_act, warp
from sacb_net.network import WIDTHS

CLUSTERS, ITERATIONS, SAMPLE = 7, 20, 8192  # as SACB-Net calls k-means
FULL_PASSES = 3  # of the default k-means: two Lloyd steps on all points, then the labels
RADIUS = 3  # of the cost volume, as in SAMConvex
WINDOW = 9  # of the LNCC


class Way(NamedTuple):
    """One row of a case: which formulation, input type and memory layout."""

    backend: str | None  # a layer, "monai", or None for the default
    dtype: str = "float32"
    layout: str = ""  # "cl": channels-last

    @property
    def label(self) -> str:
        name = {"reference": "plain", None: "default"}.get(self.backend, self.backend)
        return " ".join(filter(None, (name, self.dtype.replace("float32", ""), self.layout)))


class Ask(NamedTuple):
    """At most `limit` times the `unit` of the way `of`; for None at most `limit` in all."""

    unit: str  # "seconds" or "mib"
    of: str | None
    limit: float


class Stage(NamedTuple):
    """One pass over memory: numbers read and written, FLOP, and whether matrix units can do them."""

    numbers: float
    flop: float
    matrix: bool = False


Step = Callable[[], None]
Size = tuple[int, int, int]


class Case(NamedTuple):
    name: str
    what: str  # "forward", "forward + backward" or "training step"
    make: Callable[[list[int], int, Way], Step]
    floor: Callable[[int, int], list[Stage]]  # of voxels and channels
    tests: tuple[str, ...]
    cpu: tuple[Size, int]  # grid and channels
    cuda: tuple[Size, int]
    cpu_ways: tuple[Way, ...]
    cuda_ways: tuple[Way, ...]
    cpu_asked: tuple[Ask, ...] = ()
    cuda_asked: tuple[Ask, ...] = ()


def floor_seconds(case: Case, size: list[int], channels: int, dtype: str, rates: dict[str, float]) -> float:
    """Sum over the stages of max(bytes / bandwidth, FLOP / rate)."""
    width = getattr(torch, dtype).itemsize
    stages = case.floor(prod(size), channels)
    return sum(max(width * s.numbers / rates["bytes"], s.flop / rates[dtype if s.matrix else "vector"]) for s in stages)


# --- how to build a case: nothing but its inputs may be left in memory ---


def features(size: list[int], channels: int, way: Way, gradient: bool = True) -> Tensor:
    layout = torch.channels_last_3d if way.layout == "cl" else torch.contiguous_format
    x = torch.empty(1, channels, *size, dtype=getattr(torch, way.dtype), memory_format=layout)
    return x.normal_().requires_grad_(gradient)


def displacement(size: list[int]) -> Tensor:
    """A smooth field of a few voxels."""
    return F.interpolate(3 * torch.randn(1, 3, 5, 5, 5), size=size, mode="trilinear", align_corners=True)


def forward(call: Callable[..., object], *inputs: Tensor) -> Step:
    @torch.no_grad()
    def step() -> None:
        call(*inputs)

    return step


def both(call: Callable[..., Tensor], grad: Tensor | None, *inputs: Tensor) -> Step:
    """Output and the gradients to all inputs that ask for one; nothing accumulates."""
    leaves = [x for x in inputs if x.requires_grad]

    def step() -> None:
        torch.autograd.grad(call(*inputs), leaves, grad)

    return step


def warp_call(way: Way) -> Callable[[Tensor, Tensor], Tensor]:
    if way.backend != "monai":
        return lambda image, disp: warp(image, disp, backend=way.backend)
    from monai.networks.blocks import Warp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it uses torch's grid_sample
        return Warp(mode="bilinear", padding_mode="border")


def make_warp(size: list[int], channels: int, way: Way) -> Step:
    return forward(warp_call(way), features(size, channels, way, False), displacement(size))


def make_warp_both(size: list[int], channels: int, way: Way) -> Step:
    image, disp = features(size, channels, way), displacement(size).requires_grad_()
    return both(warp_call(way), features(size, channels, way, False), image, disp)


def make_match(size: list[int], channels: int, way: Way) -> Step:
    grad = features(size, 3, way._replace(dtype="float32"), False)
    inputs = [features(size, channels, way, False).mul_(0.2).requires_grad_() for _ in range(2)]
    return both(lambda fixed, moving: match(fixed, moving, backend=way.backend), grad, *inputs)


def make_modulated_conv3d(size: list[int], channels: int, way: Way) -> Step:
    """Clusters are regions of some voxels, as k-means of smooth features gives them."""
    labels = F.interpolate(torch.randint(CLUSTERS, (1, 1, 8, 8, 8)).float(), size=size)[0].long()
    shapes = (channels, channels, 3, 3, 3), (1, CLUSTERS, channels), (1, CLUSTERS, 27)
    parameters = [(0.1 * torch.randn(shape)).requires_grad_() for shape in shapes]
    grad = features(size, channels, way, False)
    call = lambda *inputs: modulated_conv3d(*inputs, labels, backend=way.backend)  # noqa: E731
    return both(call, grad, features(size, channels, way), *parameters)


def make_kmeans(size: list[int], channels: int, way: Way) -> Step:
    """Plain is Lloyd on all points from evenly spaced starts, which cost nothing."""
    plain = {"iterations": ITERATIONS, "init": "even", "sample": None} if way.backend == "reference" else {}
    points = torch.randn(1, prod(size), channels)
    return forward(lambda points: kmeans(points, CLUSTERS, backend=way.backend, **plain), points)


def make_cost_volume(size: list[int], channels: int, way: Way) -> Step:
    inputs = [features(size, channels, way, False) for _ in range(2)]
    return forward(lambda fixed, moving: cost_volume(fixed, moving, RADIUS, backend=way.backend), *inputs)


def make_norm_act(size: list[int], channels: int, way: Way) -> Step:
    grad, x = features(size, channels, way, False), features(size, channels, way)
    return both(lambda x: norm_act(x, backend=way.backend), grad, x)


def make_lncc(size: list[int], channels: int, way: Way) -> Step:
    warped, fixed = features(size, channels, way), features(size, channels, way, False)
    if way.backend != "monai":
        return both(lambda a, b: lncc(a, b, window=WINDOW), None, warped, fixed)
    from monai.losses import LocalNormalizedCrossCorrelationLoss

    loss = LocalNormalizedCrossCorrelationLoss(spatial_dims=3, kernel_size=WINDOW, kernel_type="rectangular")
    return both(loss, None, warped, fixed)


def make_network(size: list[int], channels: int, way: Way) -> Step:
    """The trained network on the phantom; half types by autocast."""
    image = phantom_image(size).to(torch.empty(0).device)
    net = network("plain" if way.backend == "reference" else "ours", way.backend)
    dtype = getattr(torch, way.dtype)

    @torch.no_grad()
    def step() -> None:
        with torch.autocast(image.device.type, dtype, enabled=way.dtype != "float32"):
            net(image)

    return step


def make_training(size: list[int], channels: int, way: Way) -> Step:
    """Forward, LNCC and diffusion, backward, Adam."""
    image = phantom_image(size).to(torch.empty(0).device)
    net = network("plain" if way.backend == "reference" else "ours", way.backend).train()
    dtype, loss = getattr(torch, way.dtype), RegistrationLoss(window=WINDOW)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(image.device.type, dtype, enabled=way.dtype != "float32"):
            disp = net(image)
        loss(disp, image).backward()
        optimizer.step()

    return step


# --- what a case has to move and compute ---


def floor_warp(v: int, c: int) -> list[Stage]:
    return [Stage(v * (2 * c + 3), v * (16 * c + 40))]


def floor_warp_both(v: int, c: int) -> list[Stage]:
    return floor_warp(v, c) + [Stage(v * (3 * c + 6), v * (40 * c + 60))]


def floor_match(v: int, c: int) -> list[Stage]:
    return [Stage(v * (2 * c + 4), 27 * v * (2 * c + 8))]


def floor_match_both(v: int, c: int) -> list[Stage]:
    """Backward: scores again, and a product for each of the two gradients."""
    return floor_match(v, c) + [Stage(v * (4 * c + 7), 27 * v * (6 * c + 10))]


def floor_modulated_conv3d(v: int, c: int) -> list[Stage]:
    return [Stage(v * (2 * c + 2), 54 * v * c * c, matrix=True)]


def floor_modulated_conv3d_both(v: int, c: int) -> list[Stage]:
    return floor_modulated_conv3d(v, c) + [Stage(v * (3 * c + 2), 108 * v * c * c, matrix=True)]


def floor_kmeans(v: int, c: int) -> list[Stage]:
    sample = v // max(v // SAMPLE, 1)
    full = [Stage(v * c, 2 * CLUSTERS * c * v, matrix=True)] * FULL_PASSES
    return full + [Stage(2 * v, 0)] + [Stage(sample * c, 2 * CLUSTERS * c * sample, matrix=True)] * ITERATIONS


def floor_cost_volume(v: int, c: int) -> list[Stage]:
    window = (2 * RADIUS + 1) ** 3
    return [Stage(v * (2 * c + window), 2 * c * window * v, matrix=True)]


def floor_norm_act_both(v: int, c: int) -> list[Stage]:
    """The statistics need the whole volume before anything can be normalised: both passes read twice."""
    return [Stage(3 * v * c, 6 * v * c), Stage(5 * v * c, 10 * v * c)]


def floor_lncc_both(v: int, c: int) -> list[Stage]:
    """Five box sums forward, three back, two additions an axis each (running sums)."""
    return [Stage(2 * v * c, (5 * 6 + 20) * v * c), Stage(3 * v * c, (8 * 6 + 40) * v * c)]


def floor_network(v: int, c: int) -> list[Stage]:
    """Every convolution with its normalisation (which reads and writes once more), and every operator between."""

    def conv(v: float, a: int, b: int, scans: int = 2) -> Stage:
        return Stage(scans * v * (a + 3 * b), scans * 54 * a * b * v, matrix=True)

    stages, width = [], WIDTHS[0][-1]
    for level, widths in enumerate(WIDTHS):
        here = v / 8**level
        for b in widths:
            stages.append(conv(here, c, b))
            c = b
        if level:  # scales 2..5: SACB of both scans, matching, and the displacement doubled and composed
            stages += [conv(here, c, c), Stage(4 * here * c, 0)] + 2 * floor_kmeans(int(here), c)
            stages += 2 * floor_modulated_conv3d(int(here), c) + floor_match(int(here), c)
            stages += [Stage(3 * here * 9, 0)] + floor_warp(int(here), 3)
        if level < 4:
            stages += floor_warp(int(here), c)
    pairs = (width, width, 2), (width, width, 2), (2 * width, width, 1), (width, width, 1), (width, 3, 1)
    return stages + [conv(v, *pair) for pair in pairs] + floor_warp(v, 3)


def floor_training(v: int, c: int) -> list[Stage]:
    """Backward of a convolution is two more of its size; the loss comes on top."""
    return 3 * floor_network(v, c) + floor_warp_both(v, 1) + floor_lncc_both(v, 1)


# --- the table of cases ---

PLAIN, LEAN, LAST, MONAI, OURS = Way("reference"), Way("lean"), Way("lean", layout="cl"), Way("monai"), Way(None)
HALF = "bfloat16", "float16"
TRITON = (Way("triton"), *(Way("triton", dtype, "cl") for dtype in ("float32", *HALF)))
NETWORK = (PLAIN, LEAN, OURS, *(Way(None, dtype) for dtype in HALF))
GPU = (PLAIN, LEAN, *TRITON)
SCALE_2 = (80, 96, 112)  # of a 160x192x224 scan
FULL = (160, 192, 224)


def op_test(name: str) -> str:
    return f"tests/common/ops/test_{name}.py"


LOSSES = "tests/common/test_losses.py"
OPERATORS = tuple(op_test(name) for name in ("warp", "match", "sacb", "kmeans", "norm_act"))
WHOLE = (*OPERATORS, LOSSES, "tests/bundles/test_sacb_net_network.py")

CASES = (
    Case(
        "warp_1", "forward", make_warp, floor_warp, (op_test("warp"),), (SCALE_2, 1), (FULL, 1),
        (PLAIN, MONAI, LEAN), (PLAIN, MONAI, LEAN, Way("triton"), *(Way("triton", dtype) for dtype in HALF)),
        (Ask("seconds", "monai", 0.7),),
    ),
    Case(
        "warp_16", "forward", make_warp, floor_warp, (op_test("warp"),), (SCALE_2, 16), (SCALE_2, 16),
        (PLAIN, MONAI, LEAN, LAST), (PLAIN, MONAI, *GPU[1:]), (Ask("seconds", "monai", 0.7),),
    ),
    Case(
        "warp_grad", "forward + backward", make_warp_both, floor_warp_both, (op_test("warp"),), (SCALE_2, 16),
        (SCALE_2, 16), (PLAIN, MONAI, LEAN, LAST), (PLAIN, MONAI, *GPU[1:]),
    ),
    Case(
        "match", "forward + backward", make_match, floor_match_both, (op_test("match"),), ((40, 48, 56), 32),
        (SCALE_2, 16), (PLAIN, LEAN, LAST), GPU, (Ask("seconds", "reference", 0.2), Ask("mib", "reference", 0.25)),
    ),
    Case(
        "modulated_conv3d", "forward + backward", make_modulated_conv3d, floor_modulated_conv3d_both,
        (op_test("sacb"),), ((40, 48, 56), 32), (SCALE_2, 16), (PLAIN, LEAN, LAST), GPU,
        (Ask("seconds", "reference", 0.2), Ask("mib", "reference", 0.15)),
    ),
    Case(
        "kmeans", "forward", make_kmeans, floor_kmeans, (op_test("kmeans"),), (SCALE_2, 16), (SCALE_2, 16),
        (PLAIN, LEAN), (PLAIN, LEAN, Way("triton")), (Ask("seconds", "reference", 0.2),),
    ),
    Case(
        "cost_volume", "forward", make_cost_volume, floor_cost_volume, (op_test("cost_volume"),),
        ((24, 32, 40), 32), ((96, 80, 128), 256), (PLAIN, LEAN, LAST), GPU,
    ),
    Case(
        "norm_act", "forward + backward", make_norm_act, floor_norm_act_both, (op_test("norm_act"),), (SCALE_2, 16),
        (FULL, 8), (PLAIN, LEAN, LAST), (PLAIN, LEAN, LAST, *(Way("lean", dtype, "cl") for dtype in HALF)),
    ),
    Case(
        "lncc", "forward + backward", make_lncc, floor_lncc_both, (LOSSES,), (SCALE_2, 1), (FULL, 1), (MONAI, OURS),
        (MONAI, OURS), (Ask("seconds", "monai", 0.65),),
    ),
    Case(
        "network", "forward", make_network, floor_network, WHOLE, (SCALE_2, 1), (FULL, 1), (PLAIN, OURS), NETWORK,
        (), (Ask("seconds", None, 0.02), Ask("mib", None, 3 * 1024)),
    ),
    Case(
        "network_train", "training step", make_training, floor_training, WHOLE, (SCALE_2, 1), (FULL, 1),
        (PLAIN, OURS), NETWORK, (), (Ask("seconds", None, 0.1), Ask("mib", None, 8 * 1024)),
    ),
)  # fmt: skip
