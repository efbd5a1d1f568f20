"""Instance normalisation followed by LeakyReLU, as after nearly every convolution of a registration pyramid."""

import torch
from torch import Tensor

from common.ops import _checks
from common.ops._dispatch import choose, on_plain_tensors, scripted_as
from common.ops.conv import conv3d
from common.ops.norm_act import reference
from common.ops.norm_act.lean import norm_act_lean
from common.ops.norm_act.reference import norm_act_reference


def conv_before_norm(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None = None) -> Tensor:
    """3x3x3 convolution whose result goes into `norm_act`, which takes any bias away again.

    So on a GPU, where adding it is a pass over the result and its gradient another, it is left out; its gradient is the
    zero that it is without rounding. On a CPU the bias costs nothing, and the rounding stays as it was.
    """
    if bias is None or not x.is_cuda:
        return conv3d(x, weight, bias, backend=backend)
    if torch.is_grad_enabled():
        weight = weight + 0 * bias.view(-1, 1, 1, 1, 1)
    return conv3d(x, weight)


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
    layer = choose("norm_act", x, backend)
    if layer == "reference":
        return norm_act_reference(x, slope, eps)
    if layer == "triton":
        from common.ops.norm_act.kernel import norm_act_triton

        return norm_act_triton(x, slope, eps)
    return norm_act_lean(x, slope, eps)
