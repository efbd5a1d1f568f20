"""The formula of the spatially adaptive convolution: one unfolded kernel a cluster, masked, summed. TorchScript too."""

import torch
import torch.nn.functional as F
from torch import Tensor


def modulated_conv3d_reference(x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor, labels: Tensor) -> Tensor:
    """See `common.ops.sacb.modulated_conv3d`; unfolds (B, I J K, C 27) and applies all N kernels everywhere."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    given, x, weight, bias, modulation = x.dtype, x.to(dtype), weight.to(dtype), bias.to(dtype), modulation.to(dtype)
    batch, channels, out_channels = x.shape[0], x.shape[1], weight.shape[0]
    padded = F.pad(x, [1] * 6)
    windows = padded.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)  # (B, C, I, J, K, 3, 3, 3)
    patches = windows.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(batch, -1, channels * 27)
    out = torch.zeros_like(patches[:, :, :1])
    for n in range(modulation.shape[1]):
        kernel = weight.flatten(2) * modulation[:, n].view(batch, 1, 1, 27)  # eq. 5
        value = patches @ kernel.flatten(2).transpose(1, 2) + bias[:, n].unsqueeze(1)  # eq. 6
        out = out + value * (labels.reshape(batch, -1, 1) == n)
    return out.transpose(1, 2).reshape([batch, out_channels] + list(x.shape[2:])).to(given)


def modulated_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor, labels: Tensor, backend: str | None = None
) -> Tensor:
    """What `common.ops.modulated_conv3d` is in TorchScript."""
    return modulated_conv3d_reference(x, weight, bias, modulation, labels)
