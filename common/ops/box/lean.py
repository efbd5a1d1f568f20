"""Box sums by doubling: a few passes an axis, whatever the window."""

import torch
from torch import Tensor


class _BoxSum(torch.autograd.Function):
    """Sum over a cube of odd width, zeros outside; symmetric, hence its own transpose."""

    @staticmethod
    def forward(ctx, x: Tensor, window: int) -> Tensor:
        ctx.window = window
        for axis in (2, 3, 4):
            x = _axis_sum(x, window, axis)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _BoxSum.apply(grad, ctx.window), None


def _axis_sum(x: Tensor, window: int, axis: int) -> Tensor:
    """Running sum along one axis by doubling: widths 1, 2, 4, ... are added where `window` has a binary digit.

    Unlike a cumulative sum it subtracts nothing, so that no digits cancel.
    """
    size, radius = x.shape[axis], window // 2
    shape = list(x.shape)
    shape[axis] = size + 2 * radius
    power = x.new_empty(shape)
    power.narrow(axis, 0, radius).zero_()
    power.narrow(axis, radius, size).copy_(x)
    power.narrow(axis, radius + size, radius).zero_()
    total, begin, width = None, 0, 1
    while width <= window:
        if window & width:
            part = power.narrow(axis, begin, size)
            total = part.clone() if total is None else total.add_(part)
            begin += width
        width *= 2
        if width <= window:
            length = power.shape[axis] - width // 2
            power = power.narrow(axis, 0, length) + power.narrow(axis, width // 2, length)
    return total


def box_sum_lean(x: Tensor, window: int) -> Tensor:
    """See `common.ops.box.box_sum`."""
    return _BoxSum.apply(x, window)
