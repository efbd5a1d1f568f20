"""The operators inside torch.compile, torch.export and TorchScript: the same numbers and gradients as without."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.ops import SACB, cost_volume, match, modulated_conv3d, norm_act, warp


class Registration(nn.Module):
    """Every differentiable operator, as a registration network strings them together.

    `radius` is that of the far cost volume; the one along a displacement has `near`: each of its offsets is a warp of
    its own to the compiler, which takes seconds for it.
    """

    def __init__(self, radius: int, backend: str | None = None, near: int = 0) -> None:
        super().__init__()
        self.radius, self.backend, self.near = radius, backend, near
        self.weight = nn.Parameter(0.2 * torch.randn(4, 1, 3, 3, 3))
        self.bias = nn.Parameter(torch.randn(2, 2, 4))
        self.modulation = nn.Parameter(torch.rand(2, 2, 27))

    def features(self, image: Tensor) -> Tensor:
        labels = (image[:, 0] > 0).long()
        x = modulated_conv3d(image, self.weight, self.bias, self.modulation, labels, backend=self.backend)
        return norm_act(x)

    def forward(self, moving: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        feat_moving, feat_fixed = self.features(moving), self.features(fixed)
        disp = match(feat_fixed, feat_moving, backend=self.backend)
        near = cost_volume(feat_fixed, feat_moving, self.near, disp, backend=self.backend)
        far = cost_volume(feat_fixed, feat_moving, self.radius, similarity="ssd", backend=self.backend)
        return warp(moving, disp, backend=self.backend), near, far


def outcome(net: nn.Module, run: Callable, images: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    out = run(*images)
    names = [name for name, _ in net.named_parameters()]
    grads = torch.autograd.grad(sum(x.square().sum() for x in out), list(net.parameters()))
    return dict(zip(("warped", "near", "far", *names), (*(x.detach() for x in out), *grads)))


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert value.abs().max() > 0, f"{name} is zero everywhere, so that nothing was compared"
        # The same operators in the same order; only sums of gradients may be taken in another. Their terms are as large
        # as the largest gradient, so that rounding is a share of that.
        atol = (1e-5 if value.dtype == torch.float32 else 1e-6) * float(value.abs().max())
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def images(device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    return torch.randn(2, 1, 3, 4, 5, device=device), torch.randn(2, 1, 3, 4, 5, device=device)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_compile() -> None:
    """Forward and backward as one graph each (fullgraph); aot_eager traces them as Inductor would, without its code."""
    net, pair = Registration(1).double(), [image.double() for image in images()]
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    compare(outcome(net, compiled, pair), outcome(net, net, pair))


def test_compile_kernels(kernel_device: torch.device) -> None:
    """Triton kernels are operators to the compiler, so that it neither looks into them nor breaks the graph."""
    net, pair = Registration(1, "triton").to(kernel_device), images(kernel_device)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    compare(outcome(net, compiled, pair), outcome(net, net, pair))


@pytest.mark.gpu
def test_compile_on_gpu(kernel_device: torch.device) -> None:
    """CUDA tensors take the kernels by themselves, also under Inductor; both multiply in full float32."""
    net, pair = Registration(1).cuda(), images("cuda")
    compare(outcome(net, torch.compile(net, fullgraph=True), pair), outcome(net, net, pair))


def test_export() -> None:
    """Exported programs are plain torch: nothing of ours is needed to run them.

    They hold the reference layer, which sums in another order than the lean one of the eager run.
    """
    net, pair = Registration(0).requires_grad_(False), images()
    program = torch.export.export(net, pair)
    ours = {str(node.target) for node in program.graph.nodes if "monai_registration" in str(node.target)}
    assert not ours
    for got, expected in zip(program.module()(*pair), net(*pair)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("padding", ("border", "zeros"))
def test_script(padding: str, tmp_path: Path) -> None:
    """A scripted network holds the reference layer, keeps its gradients, and takes any size once saved and loaded."""

    class Scripted(Registration):
        def __init__(self, padding: str) -> None:
            super().__init__(1, near=1)
            self.padding = padding

        def forward(self, moving: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            feat_moving, feat_fixed = self.features(moving), self.features(fixed)
            disp = match(feat_fixed, feat_moving, 2, backend=self.backend)
            near = cost_volume(feat_fixed, feat_moving, self.near, disp, padding=self.padding)
            far = cost_volume(feat_fixed, feat_moving, self.radius, similarity="ssd", padding=self.padding)
            nearest = warp(moving, disp, mode="nearest", padding=self.padding)
            return warp(moving, disp, padding=self.padding) + nearest, near, far

    net = Scripted(padding).double()
    torch.jit.script(net).save(tmp_path / "net.ts")
    loaded = torch.jit.load(tmp_path / "net.ts")
    assert "monai_registration" not in str(loaded.inlined_graph)
    for size in ((3, 4, 5), (6, 5, 4)):
        pair = tuple(torch.randn(2, 1, *size, dtype=torch.float64) for _ in range(2))
        compare(outcome(loaded, loaded, pair), outcome(net, net, pair))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "options",
    ({}, {"mean_type": "mix", "sample": 40}, {"mean_type": "c", "iterations": None, "init": "even"}),
    ids=("default", "sampled", "fixed point"),
)
def test_script_sacb(options: dict) -> None:
    """The block with its clustering, two scans a batch, on more than one size."""
    block = SACB(4, clusters=3, **options).double()
    scripted = torch.jit.script(block)
    assert "monai_registration" not in str(scripted.inlined_graph)
    for size in ((6, 5, 4), (4, 7, 6)):
        x = torch.randn(2, 4, *size, dtype=torch.float64)
        got, expected = scripted(x), block(x)
        assert (expected - x).abs().max() > 1e-3
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
