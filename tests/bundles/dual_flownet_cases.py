"""What the tests of Dual-FlowNet's network and loss share: a small network and scans for it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_flownet import DualFlowNet

SMALL = {"classes": 3, "widths": (4, 8, 8, 8, 8), "seg_widths": (4, 8, 8, 8)}
SIZE = (18, 16, 21)  # odd and even, no power of two
MODES = ("global", "region", "both", "both+rcc")


def scans(size: tuple[int, int, int] = SIZE, *, batch: int = 1, channels: int = 1) -> Tensor:
    """Packed pairs in [0, 1]: smooth structure with some texture."""
    coarse = torch.rand(batch, 2 * channels, 6, 6, 6)
    smooth = F.interpolate(coarse, size=size, mode="trilinear", align_corners=True)
    return 0.9 * smooth + 0.1 * torch.rand(smooth.shape)


def bold(net: DualFlowNet) -> DualFlowNet:
    """The network with last layers that move things by a voxel or so."""
    for cnn in (net.region_cnn, net.global_cnn):
        if cnn is not None:
            nn.init.normal_(cnn.flow.weight, std=0.5)
    return net


def waves(size: tuple[int, int, int], amplitude: float, seed: int) -> Tensor:
    """Smooth displacement that fades to zero at the border."""
    coarse = torch.zeros(1, 3, 6, 6, 6)
    coarse[..., 1:-1, 1:-1, 1:-1] = 2 * torch.rand(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) - 1
    return amplitude * F.interpolate(coarse, size=size, mode="trilinear", align_corners=True)
