"""The network of SACB-Net, in the order of the paper's section 3.

Source: Cheng et al., SACB-Net: Spatial-awareness Convolutions for Medical Image Registration, CVPR 2025. Sizes that the
paper leaves open follow the released code: an encoder of eleven convolutions and 1,105,591 parameters for any number of
clusters. Different from the released code: any input size, batch and channel count; repeatable k-means; the last
convolution starts near zero, so that an untrained network barely moves the image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.fields import compose
from common.ops import SACB, conv3d, match, norm_act, warp
from common.ops.norm_act import conv_before_norm
from common.ops.scale import double, halve

WIDTHS = ((4, 8, 8), (16, 16), (32, 32), (64, 64), (64, 64))  # channels of the convolutions at scales 1..5
DIVISOR = 16  # four halvings
STACK_VOXELS = 1 << 20  # above this, inference runs the two scans one after the other to save memory


class ConvNormAct(nn.Conv3d):
    """3x3x3 convolution, instance normalisation, LeakyReLU 0.1 (paper section 3.1)."""

    def __init__(self, in_channels: int, out_channels: int, backend: str | None) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.backend, self.convolved = backend, "reference" if backend == "reference" else None

    def forward(self, x: Tensor) -> Tensor:
        return norm_act(conv_before_norm(x, self.weight, self.bias, self.convolved), backend=self.backend)


class Encoder(nn.Module):
    """Shared encoder: (B, C, I, J, K) -> features F^1..F^5 at 1, 1/2, 1/4, 1/8, 1/16 of the resolution."""

    def __init__(self, channels: int, backend: str | None = None) -> None:
        super().__init__()
        self.scales, self.backend = nn.ModuleList(), backend
        for widths in WIDTHS:
            pairs = zip((channels, *widths[:-1]), widths)
            self.scales.append(nn.Sequential(*[ConvNormAct(a, b, backend) for a, b in pairs]))
            channels = widths[-1]

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [self.scales[0](x)]
        for scale in self.scales[1:]:
            features.append(scale(halve(features[-1], backend=self.backend)))
        return features


class SACBNet(nn.Module):
    """Pyramid flow estimator with spatial-awareness convolution blocks.

    Args:
        channels: C, channels of one scan.
        clusters: N of the SACBs (paper Table 3: 7 is best); no parameter depends on it.
        mean_type: what the SACBs cluster: "s", "c" or "mix" (paper Table 4).
        sacb_scales: the scales that have a SACB, out of 5, 4, 3, 2 (paper Table 3).
        kmeans_iterations: Lloyd steps on a sample, None to run all voxels to the fixed point (as the authors do).
        kmeans_init: start of the k-means, "spread" or "even".
        backend: layer of the operators ("reference", "lean", "triton"), None to choose by device.
    """

    def __init__(
        self,
        channels: int = 1,
        *,
        clusters: int = 7,
        mean_type: str = "s",
        sacb_scales: tuple[int, ...] = (5, 4, 3, 2),
        kmeans_iterations: int | None = 20,
        kmeans_init: str = "spread",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not set(sacb_scales) <= {5, 4, 3, 2}:
            raise ValueError(f"SACBNet() 'sacb_scales' must be out of 5, 4, 3, 2, got {tuple(sacb_scales)}")
        self.channels, self.backend = channels, backend
        self.capturable = kmeans_iterations is not None  # as a CUDA graph: nothing waits for the host
        self.encoder = Encoder(channels, backend)
        self.sacb = nn.ModuleDict(
            {
                str(scale): SACB(
                    WIDTHS[scale - 1][-1],
                    clusters=clusters,
                    mean_type=mean_type,
                    iterations=kmeans_iterations,
                    init=kmeans_init,
                    backend=backend,
                )
                for scale in sorted(sacb_scales, reverse=True)
            }
        )
        width = WIDTHS[0][-1]
        self.refine = nn.Sequential(ConvNormAct(width, width, backend), ConvNormAct(width, width, backend))
        self.flow = nn.Sequential(
            ConvNormAct(2 * width, width, backend),
            ConvNormAct(width, width, backend),
            nn.Conv3d(width, 3, 3, padding=1),
        )
        nn.init.normal_(self.flow[-1].weight, std=1e-5)
        nn.init.zeros_(self.flow[-1].bias)
        self.to(memory_format=torch.channels_last_3d)  # on CPU nearly three times faster

    def forward(self, image: Tensor) -> Tensor:
        """(B, 2C, I, J, K), first C channels moving, last C fixed -> displacement (B, 3, I, J, K) in voxels."""
        if image.ndim != 5 or image.shape[1] != 2 * self.channels:
            shape = f"(B, {2 * self.channels}, I, J, K), moving then fixed"
            raise ValueError(f"SACBNet() 'image' must have shape {shape}, got {tuple(image.shape)}")
        padding = [(-n) % DIVISOR for n in image.shape[2:]]
        padded = F.pad(image, [p for n in reversed(padding) for p in (0, n)])
        disp = self.estimate(*padded.chunk(2, dim=1))
        return disp[:, :, : image.shape[2], : image.shape[3], : image.shape[4]]

    def estimate(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """Section 3.3 for scans whose sizes the pyramid divides: coarse to fine, eq. 8-11."""
        feats_moving, feats_fixed = self.both(self.encoder, moving, fixed)
        disp = None
        for scale in (5, 4, 3, 2):
            feat_moving, feat_fixed = feats_moving.pop(), feats_fixed.pop()
            if disp is not None:
                feat_moving = warp(feat_moving, disp, padding="zeros", backend=self.backend)
            if str(scale) in self.sacb:
                feat_moving, feat_fixed = self.both(self.sacb[str(scale)], feat_moving, feat_fixed)
            delta = match(feat_fixed, feat_moving, backend=self.backend)  # eq. 8-10
            disp = delta if disp is None else compose(disp, delta, padding="zeros", backend=self.backend)
            disp = double(disp, backend=self.backend)
        del feat_moving, feat_fixed, delta
        pair = [apply(self.refine, warp(feats_moving.pop(), disp, padding="zeros", backend=self.backend))]
        pair.insert(0, apply(self.refine, feats_fixed.pop()))
        pair = [torch.cat(pair, dim=1)]
        delta = self.last(apply(self.flow[:-1], pair.pop()))  # scale 1: no matching; nothing else holds the input
        return compose(disp, delta, padding="zeros", backend=self.backend)

    def last(self, x: Tensor) -> Tensor:
        """The displacement from the last features, in float32 under autocast too: three digits of it are too few."""
        layer = self.flow[-1]
        if not torch.is_autocast_enabled(x.device.type):
            return conv3d(x, layer.weight, layer.bias, backend=self.flow[0].convolved)
        with torch.autocast(x.device.type, enabled=False):
            return conv3d(x.float(), layer.weight, layer.bias, backend=self.flow[0].convolved)

    @staticmethod
    def both(module: nn.Module, moving: Tensor, fixed: Tensor) -> tuple:
        """`module` of both scans: as one batch (faster), or one after the other where memory counts more."""
        voxels = moving.shape[2] * moving.shape[3] * moving.shape[4]
        if not torch.is_grad_enabled() and voxels > STACK_VOXELS:
            return module(moving), module(fixed)
        result = module(torch.cat([moving, fixed]))
        if isinstance(result, Tensor):
            return result.chunk(2)
        first, second = zip(*[feature.chunk(2) for feature in result])
        return list(first), list(second)


def apply(layers: nn.Sequential, x: Tensor) -> Tensor:
    """`layers` of x, letting go of each input before the next layer: at full resolution every volume counts."""
    for layer in layers:
        x = layer(x)
    return x
