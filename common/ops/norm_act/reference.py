"""The formula of norm_act in torch's own terms. For TorchScript too."""

import torch.nn.functional as F
from torch import Tensor


def norm_act_reference(x: Tensor, slope: float, eps: float) -> Tensor:
    """See `common.ops.norm_act`."""
    # One axis at a time: onnxruntime sums a whole volume in one float32, which costs four digits.
    mean = x.mean(4, keepdim=True).mean(3, keepdim=True).mean(2, keepdim=True)
    var = (x - mean).square().mean(4, keepdim=True).mean(3, keepdim=True).mean(2, keepdim=True)
    return F.leaky_relu((x - mean) / (var + eps).sqrt(), slope)


def norm_act(x: Tensor, slope: float = 0.1, eps: float = 1e-5, backend: str | None = None) -> Tensor:
    """What `common.ops.norm_act` is in TorchScript."""
    return norm_act_reference(x, slope, eps)
