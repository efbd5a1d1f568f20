"""The residual aligner (RA) module: regressor and accumulator of the paper's section 3, and the norm of the network."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.ops import warp
from common.ops.conv import Conv3d, Pointwise

HIDDEN, HEAD_HIDDEN = 18, 27  # channels inside the regressor and before the heads, as in the released code
MASKS = ("softmax", "raw")


class ScalarNorm(nn.Module):
    """Normalise a sample over space and channels together: (x - mean) / (std + 1e-3) * weight + bias, both scalars.

    Source: the released code's instance normalisation, which the paper does not describe.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = x - mean_of_all(x)
        var = mean_of_all(centred.square())  # on CPU four times faster than torch.var
        return torch.addcmul(self.bias, centred, self.weight / (var.clamp(min=1e-12).sqrt() + 1e-3))


def mean_of_all(x: Tensor) -> Tensor:
    """Mean of each sample over channels and space: (B, C, I, J, K) -> (B, 1, 1, 1, 1).

    First over what lies together in channels-last memory, ten times faster than across it. Not over all at once:
    onnxruntime sums a whole volume in one float32, which costs four digits.
    """
    return x.permute(0, 2, 3, 4, 1).flatten(3).mean(3).mean(2).mean(1).view(-1, 1, 1, 1, 1)


def conv(in_channels: int, out_channels: int, kernel: int = 3, dilation: int = 1) -> nn.Conv3d:
    """Convolution of 1 or 3 taps an axis with "same" zero padding, He-normal weights and no bias at the start."""
    if dilation == 1:
        layer = (Pointwise if kernel == 1 else Conv3d)(in_channels, out_channels)
    else:
        layer = nn.Conv3d(in_channels, out_channels, kernel, padding=dilation * (kernel // 2), dilation=dilation)
    nn.init.kaiming_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def lrelu(x: Tensor) -> Tensor:
    return F.leaky_relu_(x, 0.01)


class SharedLayers(nn.Module):
    """The convolutions that all RA modules of a network have in common; `attributes` if anything asks for those."""

    def __init__(self, heads: int, attributes: bool = True) -> None:
        super().__init__()
        self.heads_in, self.heads_out = conv(HIDDEN, HEAD_HIDDEN), conv(HEAD_HIDDEN, 3 * heads, 1)
        self.semantic = conv(HIDDEN, heads, 1)
        if attributes:
            self.increment_in, self.increment_out = conv(HIDDEN, HIDDEN), conv(HIDDEN, heads, 1)
            self.attributes_out = conv(HIDDEN, heads)
        self.disp_out = conv(HIDDEN, 1)


class Aligned(NamedTuple):
    """What one RA module passes on; all (B, channels, I, J, K) on the grid of the module."""

    disp: Tensor  # phi_k, in voxels of that grid, pull-back of the other stream onto the own one
    attributes: Tensor | None  # theta_k, one channel a head; None where nothing asks for them
    feat: Tensor  # own features with the aligned ones of the other stream fed back


class ResidualAligner(nn.Module):
    """RA module k: phi_k, theta_k = T_k(R_k(F^t, phi_(k-1)(F^s)), phi_(k-1), theta_(k-1))  (eq. 10).

    Args:
        channels: of the features.
        dilation: of the regressor's first two convolutions (section 2.3).
        heads: m.
        first: no displacement and attributes come in.
        final: no module follows, so that the attributes serve its own masks only.
        confidence: weigh the fields by confidences C^1 (eq. 12).
        multi_head: weigh the heads by masks.
        mask: "softmax" of the attributes (eq. 12), or the attributes themselves ("raw"), which is what the authors'
            published weights were trained with.

    Source: sections 3.1 and 3.2; layers that the paper does not describe as in the released code.
    """

    def __init__(
        self,
        channels: int,
        dilation: int,
        *,
        heads: int = 6,
        first: bool = False,
        final: bool = False,
        confidence: bool = True,
        multi_head: bool = True,
        mask: str = "softmax",
    ) -> None:
        super().__init__()
        self.heads, self.multi_head, self.mask = heads, multi_head, mask
        self.increments = multi_head or confidence
        self.attributes = multi_head or (confidence and not final)
        self.resample = conv(channels, channels, 1)
        self.norm_own, self.norm_other = ScalarNorm(), ScalarNorm()
        self.regress_in = conv(2 * channels, HIDDEN, dilation=dilation)
        self.regress_mid = conv(HIDDEN, HIDDEN, dilation=dilation)
        self.regress_out = conv(HIDDEN, HIDDEN)
        self.norm_semantic = ScalarNorm()
        inputs = 1 if first else 2  # the new field and attributes, and those that came in
        if self.increments:
            self.norm_increment = ScalarNorm()
        if self.attributes:
            self.attributes_in, self.norm_attributes = conv(inputs * heads, HIDDEN), ScalarNorm()
        self.disp_in = conv(inputs * (heads + 1), HIDDEN)
        self.confidence = conv(heads, 1, 1) if confidence else None
        self.feedback = conv(channels + heads, channels, 1)

    def forward(
        self, shared: SharedLayers, own: Tensor, other: Tensor, last: tuple[Tensor, Tensor | None] | None
    ) -> Aligned:
        """Align `other` to `own`, both (B, C, I, J, K); `last` = (phi_(k-1), theta_(k-1)) on this grid."""
        fields, increment, semantic = self.regress(shared, own, other, last)
        disp, attributes = self.accumulate(shared, fields, increment, last)
        aligned = warp(other, disp, padding="zeros")
        feat = own + lrelu(self.feedback(torch.cat([aligned.to(semantic.dtype), semantic], 1)))
        return Aligned(disp, attributes, feat)

    def regress(
        self, shared: SharedLayers, own: Tensor, other: Tensor, last: tuple[Tensor, Tensor | None] | None
    ) -> tuple:
        """R_k, section 3.1: residual fields (B, 3m, ...) head by head, incremental attributes, semantic attributes."""
        other = self.resample(other)
        if last is not None:
            other = warp(other, last[0], padding="zeros")
        x = lrelu(self.regress_in(torch.cat([self.norm_own(own), self.norm_other(other)], 1)))
        x = lrelu(self.regress_out(lrelu(self.regress_mid(x))) + x)
        fields, increment = shared.heads_out(lrelu(shared.heads_in(x))), None
        if self.increments:
            increment = shared.increment_out(lrelu(self.norm_increment(shared.increment_in(x))))
        return fields, increment, lrelu(self.norm_semantic(shared.semantic(x)))

    def accumulate(
        self, shared: SharedLayers, fields: Tensor, increment: Tensor, last: tuple[Tensor, Tensor | None] | None
    ) -> tuple[Tensor, Tensor | None]:
        """T_k, section 3.2: eq. 11 and 12.

        C^2 and C^4 are one pair of convolutions, applied to each component of the fields alike, and no composition or
        sum follows: their output is the new displacement, limited to twice the grid. Eq. 11 adds up the heads, here it
        is their mean; eq. 12 has the confidence after C^2, here it comes before. All as in the released code.
        """
        attributes = None
        if self.attributes:
            known = torch.cat([increment] if last is None else [increment, last[1]], 1)
            attributes = shared.attributes_out(lrelu(self.norm_attributes(self.attributes_in(known))))
        with torch.autocast(fields.device.type, enabled=False):  # displacements are float32 whatever the autocast type
            fields = fields.to(torch.promote_types(fields.dtype, torch.float32)).unflatten(1, (-1, 3))
            stack = [fields * self.weights(attributes, increment), fields.mean(1, keepdim=True)]
            if last is not None:
                old = last[0].unsqueeze(1)
                weighted = old * self.weights(attributes, last[1])
                stack += [weighted.expand(-1, self.heads, -1, -1, -1, -1), old]
            each = torch.cat(stack, 1).transpose(1, 2).flatten(0, 1)  # one component a sample
            disp = shared.disp_out(lrelu(self.disp_in(each))).view(-1, 3, *fields.shape[3:])
            return within_twice_the_grid(disp), attributes

    def weights(self, attributes: Tensor | None, reliable: Tensor | None) -> Tensor | float:
        """Head masks times confidence of eq. 12, (B, m or 1, 1, I, J, K) or 1; the confidence is that of `reliable`."""
        weight: Tensor | float = 1.0
        if self.multi_head:
            weight = attributes.to(torch.promote_types(attributes.dtype, torch.float32))
            weight = (weight.softmax(1) if self.mask == "softmax" else weight).unsqueeze(2)
        if self.confidence is not None:
            reliable = reliable.to(torch.promote_types(reliable.dtype, torch.float32))
            weight = weight * F.relu(self.confidence(F.leaky_relu(reliable, 0.01))).unsqueeze(2)
        return weight


@torch.jit.script_if_tracing  # a trace would keep the sizes that it has seen as constants
def within_twice_the_grid(disp: Tensor) -> Tensor:
    """Each component c held within 2 size_c - 1 voxels."""
    sizes = [2.0 * disp.shape[axis] - 1 for axis in (2, 3, 4)]
    limit = torch.tensor(sizes, dtype=disp.dtype, device=disp.device).view(1, 3, 1, 1, 1)
    return torch.minimum(torch.maximum(disp, -limit), limit)
