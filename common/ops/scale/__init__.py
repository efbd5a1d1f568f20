"""The small steps between the resolutions of a pyramid, each one pass over memory that stays channels-last."""

import torch
from torch import Tensor

from common.ops import _checks
from common.ops._dispatch import choose, on_plain_tensors, scripted_as
from common.ops.scale import reference
from common.ops.scale.reference import box_mean_reference, double_reference, halve_reference


@scripted_as(reference.halve)
@on_plain_tensors
def halve(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Mean of each block of 2x2x2 voxels.

    Args:
        x: (B, C, I, J, K) with even I, J, K.
        backend: "reference", "lean", "triton", or None to choose by device.

    Returns:
        (B, C, I/2, J/2, K/2) in the dtype and memory layout of `x`.

    Raises:
        ValueError: not such a volume, or an odd axis.

    Source: average pooling between the scales of SACB-Net's encoder (section 3.1).
    """
    _checks.volume("halve", "x", x)
    odd = any(int(n) % 2 for n in x.shape[2:])
    _checks.require(not odd, "halve", "x", "have even spatial sizes", tuple(x.shape[2:]))
    layer = choose("scale", x, backend, name="halve")
    if layer == "triton":
        from common.ops.scale.kernel import halve_triton

        return halve_triton(x)
    return halve_reference(x) if layer == "reference" else _Halve.apply(x)


@scripted_as(reference.double)
@on_plain_tensors
def double(disp: Tensor, *, backend: str | None = None) -> Tensor:
    """A displacement at twice the resolution, corners aligned, with twice the values (SACB-Net's up_2x, eq. 11).

    out(o) = 2 disp(o (n - 1) / (2 n - 1)) along each axis of n voxels, linear between voxels

    Args:
        disp: (B, C, I, J, K).
        backend: "reference", "lean", "triton", or None to choose by device. The kernel's gradient repeats bit for bit.

    Returns:
        (B, C, 2I, 2J, 2K).

    Raises:
        ValueError: not such a volume.

    Source: SACB-Net eq. 11, corner-aligned as in the released code.
    """
    _checks.volume("double", "disp", disp)
    if choose("scale", disp, backend, name="double") == "triton":
        from common.ops.scale.kernel import double_triton

        return double_triton(disp)
    return double_reference(disp)


@scripted_as(reference.box_mean)
@on_plain_tensors
def box_mean(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Mean over the 3x3x3 patch of each voxel, zeros outside counted. No gradient in the kernel.

    Args:
        x: (B, C, I, J, K).
        backend: "reference", "lean", "triton", or None to choose by device.

    Returns:
        (B, C, I, J, K) in at least float32, since 27 values are summed.

    Raises:
        ValueError: not such a volume.

    Source: SACB-Net eq. 2-3, the mean of a patch, which k-means clusters without a gradient.
    """
    _checks.volume("box_mean", "x", x)
    wanted = torch.is_grad_enabled() and x.requires_grad
    if choose("scale", x, backend, name="box_mean") == "triton" and not wanted:
        from common.ops.scale.kernel import box_mean_triton

        return box_mean_triton(x)
    return box_mean_reference(x)


class _Halve(torch.autograd.Function):
    """The reference, whose own gradient would be six strided ones with zeros between, added up."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return halve_reference(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        last = (grad * 0.125).permute(0, 2, 3, 4, 1)
        batch, i, j, k, channels = last.shape
        blocks = last.reshape(batch, i, 1, j, 1, k, 1, channels).expand(batch, i, 2, j, 2, k, 2, channels)
        return blocks.reshape(batch, 2 * i, 2 * j, 2 * k, channels).permute(0, 4, 1, 2, 3)
