"""Sums over cubes of voxels, of which the LNCC takes eight, and which smooth the steps of the refinement."""

from torch import Tensor

from common.ops import _checks
from common.ops._dispatch import choose, on_plain_tensors, scripted_as
from common.ops.box import reference
from common.ops.box.lean import box_sum_lean
from common.ops.box.reference import box_sum_reference


@scripted_as(reference.box_sum)
@on_plain_tensors
def box_sum(x: Tensor, window: int, *, backend: str | None = None) -> Tensor:
    """Sum over the window^3 cube around each voxel, zeros outside: its own transpose.

    Args:
        x: (B, C, I, J, K).
        window: odd width in voxels.
        backend: "reference", "lean", "triton", or None to choose by device.

    Returns:
        (B, C, I, J, K) in the dtype of `x`, differentiable twice.

    Raises:
        ValueError: not such a volume, or a window that is not odd.
    """
    _checks.volume("box_sum", "x", x)
    _checks.require(window >= 1 and window % 2 == 1, "box_sum", "window", "be odd and >= 1", window)
    layer = choose("box", x, backend, name="box_sum")
    if layer == "triton":
        from common.ops.box.kernel import box_sum_triton

        return box_sum_triton(x, window)
    return box_sum_reference(x, window) if layer == "reference" else box_sum_lean(x, window)
