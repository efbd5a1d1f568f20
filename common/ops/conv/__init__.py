"""The plain 3x3x3 convolution, whose gradients on a GPU are our own where there are few channels."""

import torch
from torch import Tensor

from common.ops import _checks
from common.ops._dispatch import choose, plain, scripted_as
from common.ops.conv import reference
from common.ops.conv.reference import conv3d_reference

FEW = 32 * 32  # products of channels up to which the kernels are taken: a guess, as they have not been timed yet


@scripted_as(reference.conv3d)
def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Convolution with 3x3x3 taps and zeros outside; the same as torch.nn.functional.conv3d with padding 1.

    out(b, o, v) = bias(o) + sum over c, t of weight(o, c, t) x(b, c, v + t)

    On an H200 cuDNN's gradients take eight times its forward pass where 8 channels meet 8 (results/gpu_h200.json of
    tests/bench). So by default the kernels, not timed yet, are taken for CUDA tensors in training, up to 32 x 32
    channels; torch's own convolution everywhere else.

    Args:
        x: (B, C, I, J, K) features; under autocast they and the weight are cast as autocast casts a convolution's.
        weight: (O, C, 3, 3, 3).
        bias: (O,), or None.
        backend: "reference", "lean" (the same), "triton", or None to choose by device.

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
    few = weight.shape[0] * weight.shape[1] <= FEW and torch.is_grad_enabled()
    if layer != "triton" or backend is None and not few:
        return conv3d_reference(x, weight, bias)
    from common.ops.conv.kernel import conv3d_triton

    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (value if value is None else value.to(dtype) for value in (x, weight, bias))
    return conv3d_triton(x, weight, bias)
