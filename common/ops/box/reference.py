"""The formula, as torch's average pooling without the division. TorchScript compiles `box_sum` below."""

import torch.nn.functional as F
from torch import Tensor


def box_sum_reference(x: Tensor, window: int) -> Tensor:
    return F.avg_pool3d(F.pad(x, [window // 2] * 6), window, stride=1, divisor_override=1)


def box_sum(x: Tensor, window: int) -> Tensor:
    return F.avg_pool3d(F.pad(x, [window // 2] * 6), window, stride=1, divisor_override=1)
