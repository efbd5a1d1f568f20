"""halve, double and box_mean in plain torch. For TorchScript too."""

import torch
import torch.nn.functional as F
from torch import Tensor


def halve_reference(x: Tensor) -> Tensor:
    """See `common.ops.scale`; slices keep channels-last memory, as index_select does not."""
    x = x[:, :, ::2] + x[:, :, 1::2]
    x = x[:, :, :, ::2] + x[:, :, :, 1::2]
    x = x[:, :, :, :, ::2] + x[:, :, :, :, 1::2]
    return x * 0.125


def double_reference(disp: Tensor) -> Tensor:
    """See `common.ops.scale`."""
    return F.interpolate(2 * disp, scale_factor=2.0, mode="trilinear", align_corners=True)


def box_mean_reference(x: Tensor) -> Tensor:
    """See `common.ops.scale`: separable shifted sums."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    for axis in (2, 3, 4):
        total, size = x.clone(), x.shape[axis]
        total.narrow(axis, 1, size - 1).add_(x.narrow(axis, 0, size - 1))
        total.narrow(axis, 0, size - 1).add_(x.narrow(axis, 1, size - 1))
        x = total
    return x.mul_(1 / 27)


def halve(x: Tensor, backend: str | None = None) -> Tensor:
    """What `common.ops.halve` is in TorchScript."""
    return halve_reference(x)


def double(disp: Tensor, backend: str | None = None) -> Tensor:
    """What `common.ops.double` is in TorchScript."""
    return double_reference(disp)


def box_mean(x: Tensor, backend: str | None = None) -> Tensor:
    """What `common.ops.box_mean` is in TorchScript."""
    return box_mean_reference(x)
