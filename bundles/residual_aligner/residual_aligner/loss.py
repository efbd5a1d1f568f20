"""Stage 2 of the training: both directions of a pair at once."""

import torch
from torch import Tensor, nn

from common.ops import warp
from residual_aligner.network import Registration


class BothDirections(nn.Module):
    """Mean of loss(disp, moving and fixed) and loss(disp_back, fixed and moving), + consistency * inverse error.

    inverse error = mean |disp(x) + disp_back(x + disp(x))|^2 / 3, over both directions, in voxels. It keeps the start
    of the training from a shift by half a voxel, whose interpolation smooths noise, which the LNCC rewards whatever the
    anatomy. For a `TrainingStep`. The network aligns the two streams to each other anyhow, so that the second direction
    costs little.

    Source: both directions as in section 2.3 of the paper, which has no term for the inverse (0).

    Args:
        loss: of one direction, `common.losses.RegistrationLoss`.
        consistency: weight of the inverse error.
    """

    def __init__(self, loss: nn.Module, consistency: float = 0.0) -> None:
        super().__init__()
        self.loss, self.consistency = loss, consistency

    def forward(self, found: Registration, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Displacements (B, 3, I, J, K) in voxels, image (B, 2C, I, J, K) = moving then fixed -> scalar."""
        disp, back = found.disp, found.disp_back
        moving, fixed = image.chunk(2, dim=1)
        value = (self.loss(disp, image) + self.loss(back, torch.cat([fixed, moving], 1))) / 2
        if self.consistency:
            errors = (disp + warp(back, disp)).square().mean(), (back + warp(disp, back)).square().mean()
            value = value + self.consistency * (errors[0] + errors[1]) / 2
        return value
