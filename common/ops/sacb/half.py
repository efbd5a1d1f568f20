"""Gradients of the modulated convolution to weight, bias and modulation by a plain convolution's, in bfloat16.

With the gradient g kept apart by clusters, g_n(v) = g(v) where label(v) = n, and P_n the plain gradient to the weight
under g_n:  dW = sum_n a_n P_n,  da[n, t] = sum_{o, c} W[o, c, t] P_n[o, c, t],  db_n = sum_v g_n(v).
The N parts of g are channels of one convolution, which cuDNN multiplies on tensor cores.
"""

import torch
from torch import Tensor

from common.ops.conv.lean import half_gradients


def half_weight_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, modulation: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to weight (O, C, 3, 3, 3), bias (B, N, O) and modulation (B, N, 27), in float32."""
    batch, clusters, outputs = len(x), modulation.shape[1], grad.shape[1]
    numbers = torch.arange(clusters, device=x.device)
    parts, biases = [], []
    for b in range(batch):  # one after the other: N times the memory of a gradient
        last = grad[b].permute(1, 2, 3, 0).to(torch.bfloat16)
        apart = last.unsqueeze(3) * (labels[b].unsqueeze(3) == numbers).unsqueeze(4)  # (I, J, K, N, O)
        biases.append(apart.sum((0, 1, 2), dtype=torch.float32))
        apart = apart.flatten(3).permute(3, 0, 1, 2)[None]
        like = weight.repeat(clusters, 1, 1, 1, 1)  # only its shape is read
        parts.append(half_gradients(apart, x[b : b + 1], like, to_weight=True)[1])
    found = torch.stack(parts).view(batch, clusters, outputs, *weight.shape[1:])
    scale = modulation.view(batch, clusters, 1, 1, 3, 3, 3)
    slopes = (found * weight).sum((2, 3)).view(batch, clusters, 27)
    return (found * scale).sum((0, 1)), torch.stack(biases), slopes
