"""The Residual Aligner Network, in the order of the paper's sections 2.3 and 3.

Source: Zheng et al., Residual Aligner Network, 2022. Channel numbers follow the paper's appendix, layers that the paper
does not describe the released code. Different from the released code: any input size, batch and channel count; both
directions and both scans run as one batch; the fields of all modules are there for training.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.ops.conv import Conv3d
from residual_aligner.aligner import HIDDEN, MASKS, Aligned, ResidualAligner, ScalarNorm, SharedLayers, conv

DIVISOR = 16  # four halvings


class Geometry(NamedTuple):
    """A variant: what distinguishes the columns of the paper's Table 2."""

    encoder: tuple[int, int, int, int]  # channels at 1/2, 1/4, 1/8, 1/16
    skip: int  # channels of the convolved shortcuts; 0 takes the encoder's features as they are
    start: int  # how many of the deepest shortcuts enter the decoder's first block
    decoder: tuple[int, int, int, int, int]  # channels of the features that the RA modules 1..5 align
    pool: tuple[int, int, int, int, int]  # p_k: voxels of the image a voxel of module k, along an axis
    dilation: tuple[int, int, int, int, int]  # of the regressors


VARIANTS = {
    "ran0": Geometry((8, 16, 16, 32), 0, 1, (32, 32, 16, 16, 8), (16, 8, 4, 2, 1), (1, 1, 1, 1, 1)),
    "ran3": Geometry((8, 16, 16, 32), 16, 2, (32, 32, 16, 16, 8), (2, 2, 2, 2, 1), (8, 4, 2, 1, 1)),
    "ran4": Geometry((8, 16, 16, 32), 12, 3, (32, 32, 16, 16, 8), (1, 1, 1, 1, 1), (16, 8, 4, 2, 1)),
    "ran4plus": Geometry((8, 16, 16, 32), 16, 3, (32, 32, 16, 16, 8), (1, 1, 1, 1, 1), (16, 8, 4, 2, 1)),
    "released": Geometry((8, 8, 16, 32), 16, 2, (32, 32, 32, 16, 8), (2, 2, 2, 2, 1), (8, 4, 2, 1, 1)),
}


class Registration(NamedTuple):
    """Both directions of a registration, and what every RA module said on the way."""

    disp: Tensor  # (B, 3, I, J, K) in voxels, on the fixed grid, samples the moving scan
    disp_back: Tensor  # the same on the moving grid, samples the fixed scan
    modules: list[Aligned]  # of the padded grids, (2B, ...): first B on the moving grid, last B on the fixed one


class ResidualBlock(nn.Module):
    """Three normalised 3x3x3 convolutions, the third with dilation 3, and the first one's output added at the end."""

    def __init__(self, in_channels: int, out_channels: int, *, upsample: bool = False) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(in_channels, out_channels, 2, stride=2) if upsample else nn.Identity()
        if upsample:
            nn.init.kaiming_normal_(self.up.weight, mode="fan_out")  # each output voxel sees every input channel once
            self.up.weight.data *= 8**0.5
            nn.init.zeros_(self.up.bias)
            in_channels = out_channels
        self.convs = nn.ModuleList([conv(in_channels, out_channels), conv(out_channels, out_channels)])
        self.convs.append(conv(out_channels, out_channels, dilation=3))
        self.norms = nn.ModuleList([ScalarNorm() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        first = F.leaky_relu_(self.norms[0](self.convs[0](self.up(x))), 0.2)
        second = F.leaky_relu_(self.norms[1](self.convs[1](first)), 0.2)
        return F.leaky_relu_(self.norms[2](self.convs[2](second)) + first, 0.2)


class RAN(nn.Module):
    """Residual Aligner Network.

    Args:
        channels: C, channels of one scan.
        variant: "ran0", "ran3", "ran4", "ran4plus" (paper Table 2), or "released" (the authors' code).
        heads: m, heads of the displacement field.
        confidence: confidence weights (CW of Table 2).
        multi_head: head masks (MH of Table 2); without them every head counts alike.
        mask: what the masks are: "softmax" of the attributes, or the "raw" attributes, for the authors' weights.
        recompute: in training, keep the inputs of the blocks only and compute their insides again on the way back: less
            memory, one more forward pass.

    Source: sections 2.3 and 3, Table 2 and the appendix; where we differ, see the top of this file.
    """

    def __init__(
        self,
        channels: int = 1,
        variant: str = "ran3",
        *,
        heads: int = 6,
        confidence: bool = True,
        multi_head: bool = True,
        mask: str = "softmax",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"RAN() 'variant' must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if mask not in MASKS:
            raise ValueError(f"RAN() 'mask' must be one of {', '.join(MASKS)}, got {mask!r}")
        if heads < 1:
            raise ValueError(f"RAN() 'heads' must be >= 1, got {heads}")
        self.channels, self.recompute = channels, recompute
        self.geometry = g = VARIANTS[variant]
        widths = (channels, *g.encoder)
        self.encoder = nn.ModuleList([ResidualBlock(a, b) for a, b in zip(widths, g.encoder)])
        self.skips = nn.ModuleList([conv(width, g.skip) for width in g.encoder] if g.skip else [])
        skips = [g.skip or width for width in g.encoder]
        inputs = [sum(skips[-g.start :])] + [g.decoder[k] + skips[3 - k] for k in range(4)]
        doubled = [False] + [g.pool[k] > g.pool[k + 1] for k in range(4)]
        self.decoder = nn.ModuleList([ResidualBlock(*n, upsample=up) for *n, up in zip(inputs, g.decoder, doubled)])
        options = {"heads": heads, "confidence": confidence, "multi_head": multi_head, "mask": mask}
        self.aligners = nn.ModuleList(
            [
                ResidualAligner(width, dilation, first=k == 0, final=k == 4, **options)
                for k, (width, dilation) in enumerate(zip(g.decoder, g.dilation))
            ]
        )
        self.shared = SharedLayers(heads, multi_head or confidence)
        self.flow = Conv3d(g.decoder[-1] + 3, 3)
        self.start_at_identity()
        self.to(memory_format=torch.channels_last_3d)

    @torch.no_grad()
    def start_at_identity(self) -> None:
        """Start as a residual pyramid: phi_k = phi_(k-1) + mean of the new fields, fields and final update nearly zero.

        Two hidden channels of C^2 carry +x and -x, and lrelu(x) - lrelu(-x) = 1.01 x. Half of a regressor's channels
        start as differences of the two streams. Neither paper nor code say how they start; from independent random
        weights the displacement reaches the loss through five distorting layers.
        """
        for aligner in self.aligners:
            known = list({aligner.heads, aligner.disp_in.in_channels - 1})  # mean field, phi_(k-1) if there is one
            nn.init.normal_(aligner.disp_in.weight[:2], std=1e-3)
            for sign, weight in zip((1, -1), aligner.disp_in.weight):
                weight[known, 1, 1, 1] += sign
            nn.init.dirac_(aligner.resample.weight)
            own, other = aligner.regress_in.weight[: HIDDEN // 2].chunk(2, 1)
            other.copy_(-own)
        nn.init.normal_(self.shared.disp_out.weight, std=1e-3)
        self.shared.disp_out.weight[0, :2, 1, 1, 1] += torch.tensor([1.0, -1.0]) / 1.01
        self.shared.heads_out.weight *= 0.1
        nn.init.normal_(self.flow.weight, std=1e-3)
        self.flow.weight[:, -3:, 1, 1, 1] += torch.eye(3)
        nn.init.zeros_(self.flow.bias)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 2C, I, J, K), first C channels moving, last C fixed -> displacement (B, 3, I, J, K) in voxels."""
        for module in self.align(self.both(image), fixed_only=True):
            last = module  # the earlier ones are let go
        return self.displacement(last, image)

    def forward_train(self, image: Tensor) -> Registration:
        """Both directions of the same pair, with the outputs of every RA module, for training and analysis."""
        modules = list(self.align(self.both(image)))
        back, disp = self.displacement(modules[-1], image).chunk(2)
        return Registration(disp, back, modules)

    def both(self, image: Tensor) -> Tensor:
        """The two streams as one batch: (B, 2C, ...) -> (2B, C, ...), moving then fixed, padded at the far ends."""
        if image.ndim != 5 or image.shape[1] != 2 * self.channels:
            shape = f"(B, {2 * self.channels}, I, J, K), moving then fixed"
            raise ValueError(f"RAN() 'image' must have shape {shape}, got {tuple(image.shape)}")
        padding = [(-n) % DIVISOR for n in image.shape[2:]]
        padded = F.pad(image, [p for n in reversed(padding) for p in (0, n)])
        return torch.cat(padded.chunk(2, dim=1))

    def align(self, streams: Tensor, *, fixed_only: bool = False) -> Iterator[Aligned]:
        """Sections 2.3 and 3, module by module, for scans whose sizes the encoder divides.

        `fixed_only` leaves out half of the last module, which the displacement on the fixed grid does not need.
        """
        shortcuts, g = self.extract(streams), self.geometry
        aligned, last = None, None
        feat = torch.cat([enlarge(x, 2**n // g.pool[0]) for n, x in enumerate(shortcuts, 1) if n > 4 - g.start], 1)
        for k, (block, aligner) in enumerate(zip(self.decoder, self.aligners)):
            if k > 0:
                before, factor = g.pool[k - 1], g.pool[k - 1] // g.pool[k]
                feat = torch.cat([aligned.feat, enlarge(shortcuts[4 - k], 2 ** (5 - k) // before)], 1)
                last = enlarge(aligned.disp * factor, factor), enlarge(aligned.attributes, factor)
            feat = self.run(block, feat)
            moving, fixed = feat.chunk(2)
            own, other = feat, torch.cat([fixed, moving])
            if fixed_only and k == 4:
                own, other, last = fixed, moving, tuple(None if x is None else x.chunk(2)[1] for x in last)
            aligned = self.run(aligner, self.shared, own, other, last)
            yield aligned

    def extract(self, streams: Tensor) -> list[Tensor]:
        """The motion-aware extractor's encoder: shortcuts at 1/2, 1/4, 1/8 and 1/16 of the resolution."""
        shortcuts = []
        for n, block in enumerate(self.encoder):
            streams = F.avg_pool3d(self.run(block, streams), 2)
            shortcuts.append(F.leaky_relu_(self.skips[n](streams), 0.2) if len(self.skips) else streams)
        return shortcuts

    def displacement(self, last: Aligned, image: Tensor) -> Tensor:
        """The final convolution of features and displacement, cut back to the grid of `image`."""
        with torch.autocast(image.device.type, enabled=False):
            disp = self.flow(torch.cat([last.feat.to(last.disp.dtype), last.disp], 1))
        return disp[:, :, : image.shape[2], : image.shape[3], : image.shape[4]]

    def run(self, module: nn.Module, *inputs):
        """`module` of the inputs; with `recompute`, nothing of its inside is kept for the gradient."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)


def enlarge(x: Tensor | None, factor: int) -> Tensor | None:
    """Nearest up-sampling of (B, C, I, J, K); None stays None."""
    return x if x is None or factor == 1 else F.interpolate(x, scale_factor=factor, mode="nearest")
