"""The convolutions in plain torch. TorchScript compiles `conv3d` and `pointwise` below."""

import torch.nn.functional as F
from torch import Tensor


def conv3d_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv3d(x, weight, bias, padding=1)


def pointwise_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv3d(x, weight, bias)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    return F.conv3d(x, weight, bias, padding=1)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    return F.conv3d(x, weight, bias)
