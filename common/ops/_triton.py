"""What the Triton kernels share. Volumes are rows of C channels: contiguous (B, I, J, K, C), voxel v = row v."""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl  # noqa: F401  the interpreter wants it in every module with a kernel
from torch import Tensor

TILE = 4096  # values that one program holds of a (voxels, channels) tile
MAX_BLOCK = 256  # voxels of one program
WIDE = 2**31 - 2**20  # values


@triton.jit
def tile_of(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Rows of this program's tile, int64 in WIDE volumes, elsewhere int32: a division of int64 is a hundred steps."""
    first = tl.program_id(0)
    if WIDE:
        first = first.to(tl.int64)
    return first * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def voxel_of(v, I, J, K):  # noqa: E741
    """Row v of a (B, I, J, K) grid as b, i, j, k, in integers of the width of v."""
    k = v % K
    j = v // K % J
    i = v // K // J % I
    b = v // K // J // I  # never K * J * I, which the arguments' int32 may not hold
    return b, i, j, k


@triton.jit
def taps_of(i, j, k, t, SIGN: tl.constexpr, I, J, K):  # noqa: E741
    """Offset of tap t in voxel rows, and whether the neighbour is inside."""
    a, e, d = SIGN * (t // 9 - 1), SIGN * ((t // 3) % 3 - 1), SIGN * (t % 3 - 1)
    inside = (i + a >= 0) & (i + a < I) & (j + e >= 0) & (j + e < J) & (k + d >= 0) & (k + d < K)
    return (a * J + e) * K + d, inside


def padded(channels: int, least: int = 1) -> int:
    """Channels of a tile: the next power of two; at least 16 where tensor cores multiply tiles."""
    return max(triton.next_power_of_2(channels), least)


def block_of(channels: int, least: int = 16) -> int:
    """Voxels of a tile with so many (padded) channels."""
    return max(min(triton.next_power_of_2(TILE // channels + 1) // 2, MAX_BLOCK), least)


def wide(*tensors: Tensor | None) -> bool:
    """Whether places in any of these tensors, or a tile beyond its end, do not fit into int32."""
    return any(x is not None and x.numel() > WIDE for x in tensors)


def rows(x: Tensor) -> Tensor:
    """(B, C, I, J, K) -> contiguous (B, I, J, K, C); a view if `x` is stored channels-last."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def volume(x: Tensor) -> Tensor:
    """(B, I, J, K, C) -> its (B, C, I, J, K) view."""
    return x.permute(0, 4, 1, 2, 3)


def on_device(op: Callable) -> Callable:
    """Decorator of an operator: its kernels are launched on the device of its first tensor, not on the current one."""

    @functools.wraps(op)
    def run(*args):
        with torch.cuda.device_of(args[0]):
            return op(*args)

    return run


def precision() -> str:
    """How the kernels multiply float32 tiles: as torch is told to convolve, by its new switch or by allow_tf32.

    What cuDNN then does is its own affair: some versions of torch keep 3-D convolutions from TF32.
    """
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"
