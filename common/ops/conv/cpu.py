"""Convolutions on a CPU: few channels come out two voxels at a time, and no size falls back to torch's slow loops.

oneDNN computes as many output channels at once as a register holds, 16 numbers of AVX-512: of 8 channels, half of its
work is thrown away. Two neighbours along k as one voxel of twice the channels fill it; in channels-last memory that is
another view of the same numbers. The pair 2k, 2k+1 reads x at 2k-1 .. 2k+2, two pairs of a volume that is shifted by
one: 8 products of C x O numbers where 6 would do, at twice the speed. All in torch's own terms, gradients too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.ops.conv.reference import conv3d_reference, pointwise_reference

LANES = {"AVX512": 16, "AVX2": 8}  # float32 numbers in a register, by torch's name of what the processor has


def conv3d_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `common.ops.conv.conv3d`."""
    if torch.compiler.is_compiling() or not torch.backends.mkldnn.is_available():
        return conv3d_reference(x, weight, bias)
    if 2 * weight.shape[0] <= LANES.get(torch.backends.cpu.get_cpu_capability(), 0):
        return paired(x, weight, bias)
    return _convolve(x, weight, bias, [1, 1, 1])


def pointwise_lean(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `common.ops.conv.pointwise`: one product of the rows of channels-last memory; oneDNN takes seven times it."""
    plain = x.device.type != "cpu" or torch.compiler.is_compiling()
    if plain or not x.is_contiguous(memory_format=torch.channels_last_3d):
        return pointwise_reference(x, weight, bias)
    return F.linear(x.permute(0, 2, 3, 4, 1), weight.flatten(1), bias).permute(0, 4, 1, 2, 3)


def paired(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of pairs of voxels along k, for any device and type."""
    batch, channels, i, j, k = x.shape
    last = F.pad(x.permute(0, 2, 3, 4, 1).contiguous(), (0, 0, 1, 1 + k % 2))
    pairs = last.view(batch, i, j, -1, 2 * channels).permute(0, 4, 1, 2, 3)
    twice = None if bias is None else bias.repeat(2)
    out = _convolve(pairs, _pair_weight(weight), twice, [1, 1, 0]).permute(0, 2, 3, 4, 1)
    return out.reshape(batch, i, j, -1, weight.shape[0])[:, :, :, :k].permute(0, 4, 1, 2, 3)


def _pair_weight(weight: Tensor) -> Tensor:
    """(O, C, 3, 3, 3) -> (2 O, 2 C, 3, 3, 2): output n of a pair has its taps at inputs n .. n + 2 of two pairs."""
    outputs, channels = weight.shape[:2]
    shifted = torch.stack([F.pad(weight, (n, 1 - n)) for n in (0, 1)])  # (2, O, C, 3, 3, 4)
    taps = shifted.view(2, outputs, channels, 3, 3, 2, 2).permute(0, 1, 6, 2, 3, 4, 5)
    taps = taps.reshape(2 * outputs, 2 * channels, 3, 3, 2)
    return taps.contiguous(memory_format=torch.channels_last_3d)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    """torch's convolution, which of its own does small volumes on one thread without oneDNN: three times slower."""
    own = x.dtype == torch.float32 and torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu")
    if not own or x.device.type != "cpu" or type(x) is not Tensor:  # oneDNN wants memory, which fake tensors have not
        return F.conv3d(x, weight, bias, padding=padding)
    return torch.mkldnn_convolution(x, weight, bias, padding, [1, 1, 1], [1, 1, 1], 1)
