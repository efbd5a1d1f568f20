"""The plain 3x3x3 convolution: torch's own, with gradients that a GPU takes faster, and a kernel for one channel."""

import torch
from torch import Tensor

from common.ops import _checks
from common.ops._dispatch import choose, plain, scripted_as
from common.ops.conv import reference
from common.ops.conv.lean import conv3d_lean
from common.ops.conv.reference import conv3d_reference

FEW = 1  # inputs up to which the kernel is faster than cuDNN


@scripted_as(reference.conv3d)
def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Convolution with 3x3x3 taps and zeros outside; the same as torch.nn.functional.conv3d with padding 1.

    out(b, o, v) = bias(o) + sum over c, t of weight(o, c, t) x(b, c, v + t)

    The values are torch's own, but for one channel on a GPU, where a kernel takes a third of cuDNN's time. The
    gradients of float32 on a GPU are products of bfloat16 with sums in float32, wherever torch may take TF32
    (torch.backends.cudnn.conv.fp32_precision): they differ from torch's by some 0.002 of their size. A training step of
    SACB-Net takes 98 ms on an H200, where it took 224 (results/gpu_h200.json of tests/bench).

    Args:
        x: (B, C, I, J, K) features; under autocast they and the weight are cast as autocast casts a convolution's.
        weight: (O, C, 3, 3, 3).
        bias: (O,), or None.
        backend: "reference" (torch's own), "lean" (with those gradients), "triton", or None to choose by device.

    Returns:
        (B, O, I, J, K).

    Raises:
        ValueError: shapes that are not as above.
    """
    x, weight = plain(x), plain(weight)
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
