"""The convolution of torch with gradients of its own: on a GPU cuDNN's in TF32 take eight times its forward pass."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.ops.conv.cpu import conv3d_cpu
from common.ops.conv.reference import conv3d_reference

ONES = [1, 1, 1]


def conv3d_lean(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `common.ops.conv.conv3d`."""
    if x.device.type == "cpu":
        return conv3d_cpu(x, weight, bias)
    if not by_halves(x) or torch.is_autocast_enabled(x.device.type):
        return conv3d_reference(x, weight, bias)
    return HalfGradients.apply(x, weight, bias)


def by_halves(x: Tensor) -> bool:
    """Whether gradients of x are products of bfloat16: on a GPU, where float32 may be multiplied as TF32."""
    return x.is_cuda and x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"


class HalfGradients(torch.autograd.Function):
    """Gradients of products of bfloat16 with sums in float32, as autocast takes them."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return conv3d_reference(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        x_slope, weight_slope = half_gradients(grad, x, weight, to_x=to_x, to_weight=to_weight)
        return x_slope, weight_slope, grad.sum((0, 2, 3, 4)) if to_bias else None


def half_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, *, to_x: bool = False, to_weight: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to x and weight, each in float32 with the digits of bfloat16, or None where it is not wanted."""
    half = (value.to(torch.bfloat16) for value in (grad, x, weight))
    found = torch.ops.aten.convolution_backward(
        *half, None, ONES, ONES, ONES, False, [0, 0, 0], 1, [to_x, to_weight, False]
    )
    return tuple(None if value is None else value.float() for value in found[:2])
