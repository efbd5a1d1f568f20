"""Random features and displacements for the tests of cost volumes and their pyramid."""

import torch
from torch import Tensor


def pair(size: tuple[int, int, int], *, batch: int = 2, channels: int = 5) -> dict[str, Tensor]:
    return {name: torch.randn(batch, channels, *size) for name in ("feat_fixed", "feat_moving")}


def off_grid(size: tuple[int, int, int], *, batch: int = 2, reach: int = 2) -> Tensor:
    """Displacements up to `reach` voxels and at least 0.15 away from every integer, where the formula has a kink."""
    return torch.randint(-reach, reach, (batch, 3, *size)) + 0.15 + 0.7 * torch.rand(batch, 3, *size)
