"""The plain 3x3x3 convolution: torch's own, or by name a kernel with gradients for few channels."""

import torch
from torch import Tensor

from common.ops import _checks
from common.ops._dispatch import choose, plain, scripted_as
from common.ops.conv import reference
from common.ops.conv.reference import conv3d_reference


@scripted_as(reference.conv3d)
def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Convolution with 3x3x3 taps and zeros outside; the same as torch.nn.functional.conv3d with padding 1.

    out(b, o, v) = bias(o) + sum over c, t of weight(o, c, t) x(b, c, v + t)

    By default it is torch's own. On an H200 cuDNN's gradients take eight times its forward pass where 8 channels meet
    8, but with the kernels in their place, up to 32 x 32 channels, a training step of SACB-Net took 241 ms, not less
    than before (results/gpu_h200.json of tests/bench). So the kernels are taken by name only, until
    `bench_gpu.py --parts convolutions` says for which channels they pay.

    Args:
        x: (B, C, I, J, K) features; under autocast they and the weight are cast as autocast casts a convolution's.
        weight: (O, C, 3, 3, 3).
        bias: (O,), or None.
        backend: "reference", "lean" (the same), "triton", or None for torch's own.

    Returns:
        (B, O, I, J, K).

    Raises:
        ValueError: shapes that are not as above.
    """
    x, weight = plain(x), plain(weight)
    _checks.volume("conv3d", "x", x)
    fits = weight.ndim == 5 and tuple(weight.shape[1:]) == (x.shape[1], 3, 3, 3)
    _checks.require(fits, "conv3d", "weight", f"have shape (O, {x.shape[1]}, 3, 3, 3)", tuple(weight.shape))
    if backend is None or choose("conv", x, backend, name="conv3d") != "triton":
        return conv3d_reference(x, weight, bias)
    from common.ops.conv.kernel import conv3d_triton

    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (value if value is None else value.to(dtype) for value in (x, weight, bias))
    return conv3d_triton(x, weight, bias)
