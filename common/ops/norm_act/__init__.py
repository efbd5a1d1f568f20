"""Instance normalisation followed by LeakyReLU, as after nearly every convolution of a registration pyramid."""

from torch import Tensor

from common.ops import _checks
from common.ops._dispatch import choose, on_plain_tensors, scripted_as
from common.ops.norm_act import reference
from common.ops.norm_act.lean import norm_act_lean
from common.ops.norm_act.reference import norm_act_reference


@scripted_as(reference.norm_act)
@on_plain_tensors
def norm_act(x: Tensor, slope: float = 0.1, eps: float = 1e-5, *, backend: str | None = None) -> Tensor:
    """Normalise each channel of each sample over space, then apply LeakyReLU.

    y = (x - mean) / sqrt(var + eps),  out = y if y > 0 else slope * y

    Args:
        x: (B, C, I, J, K) features.
        slope: of the LeakyReLU, > 0.
        eps: added to the (biased) variance.
        backend: "reference", "lean", "triton", or None to choose by device.

    Returns:
        (B, C, I, J, K) in the dtype of `x`.

    Raises:
        ValueError: shape or slope are not as above.

    Source: SACB-Net section 3.1 (slope 0.1; no affine parameters, no running statistics, as in the released code).
    """
    _checks.volume("norm_act", "x", x)
    _checks.require(slope > 0, "norm_act", "slope", "be > 0", slope)
    if choose("norm_act", x, backend) == "reference":
        return norm_act_reference(x, slope, eps)
    return norm_act_lean(x, slope, eps)
