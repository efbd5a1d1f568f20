"""Pull-back of an image, a label map or a field along a displacement."""

from torch import Tensor

from common.ops import _checks
from common.ops._dispatch import choose, on_plain_tensors, scripted_as
from common.ops.warp import reference
from common.ops.warp.lean import warp_lean
from common.ops.warp.reference import warp_reference

MODES = ("linear", "nearest")
PADDINGS = ("border", "zeros")


@scripted_as(reference.warp)
@on_plain_tensors
def warp(
    image: Tensor, disp: Tensor, mode: str = "linear", padding: str = "border", *, backend: str | None = None
) -> Tensor:
    """Sample `image` at x + disp(x) and return the result on the grid of `disp`.

    out(x) = sum over the 8 corners c of the cell that holds x + disp(x) of weight_c * image(c)

    Args:
        image: (B, C, I', J', K') image, float; its grid may differ in size from the grid of `disp`.
        disp: (B, 3, I, J, K) displacement in voxels, component c along axis c, as in MONAI's DDF.
        mode: "linear" (differentiable in both inputs) or "nearest" (for labels; no gradient to `disp`).
        padding: outside the image take the nearest voxel ("border") or 0 ("zeros").
        backend: "reference", "lean", "triton", or None to choose by device.

    Returns:
        (B, C, I, J, K) in the dtype of `image`. Coordinates are computed in at least float32.

    Raises:
        ValueError: shapes, dtypes, mode or padding are not as above.

    Source: spatial transformer of the pull-back form phi = Id + u (SACB-Net eq. 1). The authors' code
    pads with zeros; here "border" is the default, as in MONAI's Warp, and "zeros" serves parity.
    """
    _checks.volume("warp", "image", image)
    _checks.volume("warp", "disp", disp, channels=3)
    _checks.require(image.shape[0] == disp.shape[0], "warp", "disp", f"have batch {image.shape[0]}", disp.shape[0])
    _checks.require(image.device == disp.device, "warp", "disp", f"be on {image.device}", disp.device)
    _checks.require(mode in MODES, "warp", "mode", f"be one of {MODES}", repr(mode))
    _checks.require(padding in PADDINGS, "warp", "padding", f"be one of {PADDINGS}", repr(padding))
    # The lean layer is plain torch too (one grid_sample), so it is also the one to export.
    layer = choose("warp", image, backend, portable="lean")
    if layer == "reference":
        return warp_reference(image, disp, mode, padding)
    if layer == "triton":
        from common.ops.warp.kernel import warp_triton

        return warp_triton(image, disp, mode, padding)
    return warp_lean(image, disp, mode, padding)
