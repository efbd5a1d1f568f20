"""SAM: self-supervised anatomical embedding, a unit vector a voxel that says where in the body it is."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.ops.conv import Conv3d, Pointwise

LOCAL, GLOBAL = (2, 2, 2), (8, 8, 2)  # strides of the two embeddings, voxels of the scan


class Embedding(NamedTuple):
    """Unit vectors on two grids over one scan: `fine` (B, E, I/2, J/2, K/2), `coarse` (B, E, I/8, J/8, K/2)."""

    fine: Tensor
    coarse: Tensor


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each voxel: a crop and the whole scan give the same, at any batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class Residual(nn.Module):
    """Two 3x3x3 convolutions with normalisation, added to the input (or to its 1x1x1 projection)."""

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = ChannelNorm(outputs)
        self.conv2 = Conv3d(outputs, outputs, bias=False)
        self.norm2 = ChannelNorm(outputs)
        same = inputs == outputs and max(stride) == 1
        self.skip = nn.Identity() if same else nn.Conv3d(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu_()
        return self.norm2(self.conv2(y)).add_(self.skip(x)).relu_()


class Embedder(nn.Module):
    """Local and global embedding of a scan: a residual pyramid with two heads.

    Stem (stride 2), three stages at strides 2, (4, 4, 2) and (8, 8, 2); the global head reads the last, the local head
    the sum of all three, brought to the first one's grid.

    Args:
        channels: C of a scan.
        widths: channels of the three stages.
        embedding: E, length of either vector.

    Source: SAM (Yan et al., TMI 2022), with the strides that SAMConvex section 2.3 states. The authors' backbone is a
    3-D ResNet-18 with batch normalisation, 32.8 M parameters and 128 numbers a vector; this one has 1.2 M and 32, and
    normalises each voxel by itself, since the levels of an image pyramid differ in their statistics.
    """

    def __init__(self, channels: int = 1, *, widths: tuple[int, int, int] = (32, 48, 96), embedding: int = 32) -> None:
        super().__init__()
        first, second, third = widths
        self.stem = nn.Sequential(
            nn.Conv3d(channels, first, 5, stride=2, padding=2, bias=False), ChannelNorm(first), nn.ReLU(inplace=True)
        )
        self.stage1 = Residual(first, first)
        self.stage2 = nn.Sequential(Residual(first, second, (2, 2, 1)), Residual(second, second))
        self.stage3 = nn.Sequential(Residual(second, third, (2, 2, 1)), Residual(third, third))
        self.lateral = nn.ModuleList(Pointwise(width, embedding) for width in widths)
        self.local_head = Conv3d(embedding, embedding)
        self.global_head = nn.Sequential(Pointwise(third, embedding), Conv3d(embedding, embedding))

    def forward(self, image: Tensor) -> Embedding:
        """(B, C, I, J, K) scan, scaled to [0, 1], of any size."""
        image = image.contiguous(memory_format=torch.channels_last_3d)
        one = self.stage1(self.stem(image))
        two = self.stage2(one)
        three = self.stage3(two)
        fine = self.lateral[2](three)
        fine = self.lateral[1](two).add_(F.interpolate(fine, size=two.shape[2:], mode="nearest"))
        fine = self.lateral[0](one).add_(F.interpolate(fine, size=one.shape[2:], mode="nearest"))
        return Embedding(F.normalize(self.local_head(fine), dim=1), F.normalize(self.global_head(three), dim=1))


class SAM(nn.Module):
    """SAM features for `SAMConvex`: local and global embedding side by side, the local one alone on the finest level.

    Args:
        channels, widths, embedding: of `Embedder`.
    """

    def __init__(self, channels: int = 1, *, widths: tuple[int, int, int] = (32, 48, 96), embedding: int = 32) -> None:
        super().__init__()
        self.embedder = Embedder(channels, widths=widths, embedding=embedding)

    def forward(self, image: Tensor, finest: bool = True) -> Tensor:
        """(B, C, I, J, K) -> (B, 2E, I/2, J/2, K/2), each half of unit length; the last level (B, E, ...).

        Source: SAMConvex section 2.3. That the last level has no global half is the released code's.
        """
        fine, coarse = self.embedder(image)
        if finest:
            return fine
        coarse = F.interpolate(coarse, size=fine.shape[2:], mode="trilinear", align_corners=True)
        return torch.cat([fine, F.normalize(coarse, dim=1)], 1)
