"""The plain convolutions of 3x3x3 and 1x1x1 taps: torch's own, with what a CPU or a GPU does faster in its place."""

import torch
from torch import Tensor, nn

from common.ops import _checks
from common.ops._dispatch import choose, plain, scripted_as
from common.ops.conv import reference
from common.ops.conv.cpu import pointwise_lean
from common.ops.conv.lean import conv3d_lean
from common.ops.conv.reference import conv3d_reference, pointwise_reference

FEW = 1  # inputs up to which the kernel is faster than cuDNN


@scripted_as(reference.conv3d)
def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Convolution with 3x3x3 taps and zeros outside; the same as torch.nn.functional.conv3d with padding 1.

    out(b, o, v) = bias(o) + sum over c, t of weight(o, c, t) x(b, c, v + t)

    The values are torch's own, but for one channel on a GPU, where a kernel takes a third of cuDNN's time, and for
    rounding on a CPU, where few outputs are computed two voxels at a time (`cpu.py`). The gradients of float32 on a GPU
    are products of bfloat16 with sums in float32, wherever torch may take TF32
    (torch.backends.cudnn.conv.fp32_precision): they differ from torch's by some 0.002 of their size. A training
    step of SACB-Net takes 98 ms on an H200, where it took 224 (results/gpu_h200.json of tests/bench).

    Args:
        x: (B, C, I, J, K) features; under autocast they and the weight are cast as autocast casts a convolution's.
        weight: (O, C, 3, 3, 3).
        bias: (O,), or None.
        backend: "reference" (torch's own), "lean" (those pairs, those gradients), "triton", or None: by device.

    Returns:
        (B, O, I, J, K).

    Raises:
        ValueError: shapes that are not as above.
    """
    x, weight, bias = plain(x), plain(weight), plain(bias)
    _checks.volume("conv3d", "x", x)
    fits = weight.ndim == 5 and tuple(weight.shape[1:]) == (x.shape[1], 3, 3, 3)
    _checks.require(fits, "conv3d", "weight", f"have shape (O, {x.shape[1]}, 3, 3, 3)", tuple(weight.shape))
    layer = choose("conv", x, backend, name="conv3d")
    if backend is None and layer == "triton" and x.shape[1] > FEW:
        layer = "lean"
    if layer != "triton":
        return conv3d_reference(x, weight, bias) if layer == "reference" else conv3d_lean(x, weight, bias)
    from common.ops.conv.kernel import conv3d_triton

    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (value if value is None else value.to(dtype) for value in (x, weight, bias))
    return conv3d_triton(x, weight, bias)


@scripted_as(reference.pointwise)
def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Convolution with one tap: a matrix product for each voxel.

    out(b, o, v) = bias(o) + sum over c of weight(o, c) x(b, c, v)

    Args:
        x: (B, C, I, J, K) features.
        weight: (O, C, 1, 1, 1).
        bias: (O,), or None.
        backend: "reference", "lean", or None to choose by device; there is no kernel, so that "triton" is refused.

    Returns:
        (B, O, I, J, K).

    Raises:
        ValueError: shapes that are not as above.
    """
    x, weight, bias = plain(x), plain(weight), plain(bias)
    _checks.volume("pointwise", "x", x)
    fits = weight.ndim == 5 and tuple(weight.shape[1:]) == (x.shape[1], 1, 1, 1)
    _checks.require(fits, "pointwise", "weight", f"have shape (O, {x.shape[1]}, 1, 1, 1)", tuple(weight.shape))
    layer = choose("pointwise", x, backend)
    return (pointwise_lean if layer == "lean" else pointwise_reference)(x, weight, bias)


class Conv3d(nn.Conv3d):
    """torch.nn.Conv3d of 3x3x3 taps with zeros outside; on a CPU by `conv3d`."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":  # the faster gradients were not tried with the networks that have this layer
            return self._conv_forward(x, self.weight, self.bias)
        return conv3d(x, self.weight, self.bias)


class Pointwise(nn.Conv3d):
    """torch.nn.Conv3d of 1x1x1 taps, by `pointwise`."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias)
