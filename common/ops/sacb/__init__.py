"""Spatially adaptive convolution and the SACB block, which drops into any 3-D network."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.ops import _checks
from common.ops._dispatch import choose, on_plain_tensors, scripted_as
from common.ops.kmeans import kmeans
from common.ops.norm_act import conv_before_norm, norm_act
from common.ops.sacb import reference
from common.ops.sacb.lean import modulated_conv3d_lean
from common.ops.sacb.reference import modulated_conv3d_reference
from common.ops.scale import box_mean

MEAN_TYPES = ("s", "c", "mix")


@scripted_as(reference.modulated_conv3d)
@on_plain_tensors
def modulated_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor, labels: Tensor, *, backend: str | None = None
) -> Tensor:
    """3x3x3 convolution whose taps and bias depend on the cluster of the output voxel.

    out[o](v) = sum_{c,t} modulation[n, t] weight[o, c, t] x[c](v + t) + bias[n, o],  n = labels(v)

    Args:
        x: (B, C, I, J, K) features; zeros outside.
        weight: (O, C, 3, 3, 3) kernel shared by all clusters.
        bias: (B, N, O) bias of each cluster.
        modulation: (B, N, 27) factor of each tap, taps ordered i, j, k; the same for all channels.
        labels: (B, I, J, K) integer cluster of each voxel, 0..N-1; the range is not checked (on a GPU it would wait).
        backend: "reference", "lean", "triton", or None to choose by device.

    Returns:
        (B, O, I, J, K) in the dtype of `x`.

    Raises:
        ValueError: shapes or dtypes are not as above.

    Source: SACB-Net eq. 5-6. The paper leaves the shape of F_w open; the released code has it emit one scalar a tap,
    and this operator relies on that: the cost does not depend on N.
    """
    op = "modulated_conv3d"
    _checks.volume(op, "x", x)
    batch, channels = x.shape[:2]
    shape = (weight.shape[0], channels, 3, 3, 3)
    _checks.require(
        tuple(weight.shape) == shape, op, "weight", f"have shape (O, {channels}, 3, 3, 3)", tuple(weight.shape)
    )
    ok = modulation.ndim == 3 and modulation.shape[0] == batch and modulation.shape[2] == 27
    _checks.require(ok, op, "modulation", f"have shape ({batch}, N, 27)", tuple(modulation.shape))
    shape = (batch, modulation.shape[1], weight.shape[0])
    _checks.require(tuple(bias.shape) == shape, op, "bias", f"have shape {shape}", tuple(bias.shape))
    shape = (batch, *x.shape[2:])
    _checks.require(tuple(labels.shape) == shape, op, "labels", f"have shape {shape}", tuple(labels.shape))
    _checks.require(_checks.is_integer(labels), op, "labels", "be integer", labels.dtype)
    layer = choose("sacb", x, backend, name=op)
    if layer == "reference":
        return modulated_conv3d_reference(x, weight, bias, modulation, labels)
    if layer == "triton":
        from common.ops.sacb.kernel import modulated_conv3d_triton

        return modulated_conv3d_triton(x, weight, bias, modulation, labels)
    return modulated_conv3d_lean(x, weight, bias, modulation, labels)


class Clusters(NamedTuple):
    """Result of a SACB's clustering: labels (B, I, J, K) and centroids (B, N, P)."""

    labels: Tensor
    centroids: Tensor


class SACB(nn.Module):
    """Spatial-awareness convolution block: x + act(SAC(x)), SAC adapted to the k-means clusters of the features.

    Args:
        channels: C of input and output.
        clusters: N; may be changed after construction, no parameter depends on it.
        mean_type: what is clustered: the mean over the 27 taps of a patch ("s", C numbers), over its channels
            ("c", 27 numbers), or both ("mix").
        iterations, sample, init: of `common.ops.kmeans`; iterations None runs to the fixed point, as the authors do.
        backend: layer of the operators, None to choose by device.

    Source: SACB-Net section 3.2, eq. 2-7, Table 4 (mean_type). As in the released code the convolved and clustered
    features are a projection of x, while the residual is x itself. Centroids carry no gradient.
    """

    def __init__(
        self,
        channels: int,
        *,
        clusters: int = 7,
        mean_type: str = "s",
        iterations: int | None = 20,
        sample: int | None = 8192,
        init: str = "spread",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _checks.require(mean_type in MEAN_TYPES, "SACB", "mean_type", f"be one of {MEAN_TYPES}", repr(mean_type))
        self.clusters, self.mean_type, self.backend = clusters, mean_type, backend
        self.iterations, self.sample, self.init = iterations, sample, init
        self.convolved = "reference" if backend == "reference" else None
        points = {"s": channels, "c": 27, "mix": channels + 27}[mean_type]
        self.proj_in = nn.Conv3d(channels, channels, 3, padding=1)
        self.weight = nn.Parameter(nn.Conv3d(channels, channels, 3).weight.detach().clone())
        self.kernel_mlp = _mlp(points, 128, 27).append(nn.Sigmoid())  # F_w of eq. 5
        self.bias_mlp = _mlp(points, 64, channels)  # F_b of eq. 6

    def forward(self, x: Tensor, clusters: Clusters | None = None) -> Tensor:
        """(B, C, I, J, K) -> the same shape. `clusters` replaces the k-means (for tests and studies)."""
        projected = conv_before_norm(x, self.proj_in.weight, self.proj_in.bias, self.convolved)
        features = norm_act(projected, backend=self.backend)
        labels, centroids = self.cluster(features) if clusters is None else clusters
        bias, modulation = self.bias_mlp(centroids), self.kernel_mlp(centroids)
        sac = modulated_conv3d(features, self.weight, bias, modulation, labels, backend=self.backend)
        return x + F.leaky_relu(sac, 0.1)  # eq. 7

    def cluster(self, features: Tensor) -> Clusters:
        """K-means of the patch means of (B, C, I, J, K) features (eq. 2-4)."""
        batch, channels, i, j, k = features.shape
        means: list[Tensor] = []
        with torch.no_grad():
            if self.mean_type != "c":
                mean = box_mean(features, backend=self.backend)
                means.append(mean.permute(0, 2, 3, 4, 1).reshape(batch, -1, channels))
            if self.mean_type != "s":
                padded = F.pad(features.mean(1), [1] * 6)
                means.append(padded.unfold(1, 3, 1).unfold(2, 3, 1).unfold(3, 3, 1).reshape(batch, -1, 27))
            points = means[0] if len(means) == 1 else torch.cat(means, 2)
            clusters = min(self.clusters, points.shape[1])  # a grid of fewer voxels than clusters
            labels, centroids = kmeans(
                points, clusters, self.iterations, self.init, sample=self.sample, backend=self.backend
            )
            return Clusters(labels.view(batch, i, j, k), centroids)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )
