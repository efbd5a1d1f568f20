"""The two convolutional networks of Dual-FlowNet (paper section 4.4 and Fig. 2), from MONAI's convolution block."""

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution
from torch import Tensor, nn

from common.ops.conv import Conv3d, Pointwise

GROUP = 4  # channels normalised together


def block(in_channels: int, out_channels: int, *, stride: int = 1, up: bool = False) -> Convolution:
    """3x3x3 convolution (`up`: deconvolution of stride 2), group normalisation, ReLU."""
    layer = Convolution(
        3,
        in_channels,
        out_channels,
        strides=2 if up else stride,
        kernel_size=3,
        adn_ordering="NA",
        norm=("group", {"num_groups": max(out_channels // GROUP, 1)}),
        act=("relu", {"inplace": True}),
        is_transposed=up,
    )
    if stride == 1 and not up:  # the same parameters in a layer that is quicker on a CPU
        with torch.device("meta"):
            quick = Conv3d(in_channels, out_channels)
        quick.load_state_dict(layer.conv.state_dict(), assign=True)
        layer.conv = quick
    return layer


def check_widths(owner: str, name: str, widths: tuple[int, ...], levels: int) -> None:
    """Refuse widths that do not give the levels of the paper, or that groups of four channels do not divide."""
    if len(widths) != levels or any(width < GROUP or width % GROUP for width in widths):
        raise ValueError(f"{owner}() '{name}' must be {levels} multiples of {GROUP}, got {tuple(widths)}")


class SegCNN(nn.Module):
    """Segmentation network (Fig. 2a): a scan -> logits at 1, 1/2 and 1/4 of its resolution, finest first.

    Args:
        channels: of a scan.
        outputs: classes with background.
        widths: channels of the four levels.

    Source: section 4.4. Open there and chosen here: the second convolution of a level only reduces; the lowest level
    has the first one alone; a decoder stage is the deconvolution, joined with the skip (no convolution after it).
    """

    def __init__(self, channels: int, outputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        check_widths("SegCNN", "widths", widths, 4)
        self.convs = nn.ModuleList([block(a, b) for a, b in zip((channels, *widths), widths)])
        self.reduce = nn.ModuleList([block(width, width, stride=2) for width in widths[:-1]])
        below = [widths[3], 2 * widths[2], 2 * widths[1]]
        self.up = nn.ModuleList([block(a, b, up=True) for a, b in zip(below, widths[2::-1])])
        self.outputs = nn.ModuleList([Pointwise(2 * width, outputs) for width in widths[2::-1]])

    def forward(self, scan: Tensor) -> list[Tensor]:
        """(B, C, I, J, K) -> three (B, outputs, ...); voxel x of the second and third lies at 2x and 4x."""
        x, skips = self.convs[0](scan), []
        for reduce, conv in zip(self.reduce, self.convs[1:]):
            skips.append(x)
            x = conv(reduce(x))
        logits = []
        for up, output in zip(self.up, self.outputs):
            skip = skips.pop()
            i, j, k = skip.shape[2:]
            x = torch.cat([up(x)[:, :, :i, :j, :k], skip], 1)  # an odd size grew by one voxel
            logits.insert(0, output(x))
        return logits


class RegCNN(nn.Module):
    """Registration network (Fig. 2b): two stacked volumes -> displacement (B, 3, I, J, K) in voxels.

    Args:
        in_channels: of both volumes together.
        widths: channels of the five levels.

    Source: section 4.4. Open there and chosen here: trilinear up-sampling; the last layer starts near zero, so that an
    untrained network barely moves the image.
    """

    def __init__(self, in_channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        check_widths("RegCNN", "widths", widths, 5)
        self.encoder = nn.ModuleList([block(a, b) for a, b in zip((in_channels, *widths), widths)])
        stages = [[block(widths[n + 1] + widths[n], widths[n])] for n in (3, 2, 1, 0)]
        for stage, width in zip(stages[2:], (widths[1], widths[0])):  # two convolutions in the last two stages
            stage.append(block(width, width))
        self.decoder = nn.ModuleList([nn.Sequential(*stage) for stage in stages])
        self.flow = Pointwise(widths[0], 3)
        nn.init.normal_(self.flow.weight, std=1e-5)
        nn.init.zeros_(self.flow.bias)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        pair = torch.cat([moving, fixed], 1).contiguous(memory_format=torch.channels_last_3d)
        features = [self.encoder[0](pair)]
        for conv in self.encoder[1:]:
            features.append(conv(F.max_pool3d(features[-1], 2, ceil_mode=True)))
        x = features.pop()
        for stage in self.decoder:
            skip = features.pop()
            x = F.interpolate(x, size=skip.shape[2:], mode="trilinear", align_corners=True)
            x = stage(torch.cat([x, skip], 1))
        with torch.autocast(x.device.type, enabled=False):  # displacements are float32 whatever the autocast type
            return self.flow(x.to(self.flow.weight.dtype))
