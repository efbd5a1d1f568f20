"""Argument checks of the operators, in one wording: `op() 'argument' must ..., got ...`."""

import torch
from torch import Tensor


def require(condition: bool, op: str, argument: str, must: str, got: object) -> None:
    """Raise ValueError in the collection's wording unless `condition` holds."""
    if not condition:
        raise ValueError(f"{op}() '{argument}' must {must}, got {got}")


def volume(op: str, argument: str, x: Tensor, channels: int | None = None) -> None:
    """`x` is a floating (B, C, I, J, K) tensor, with `channels` channels where given."""
    require(isinstance(x, Tensor), op, argument, "be a torch.Tensor", type(x).__name__)
    require(x.ndim == 5, op, argument, "have shape (B, C, I, J, K)", tuple(x.shape))
    require(x.is_floating_point(), op, argument, "be floating point", x.dtype)
    require(min(x.shape) > 0, op, argument, "have no empty axis", tuple(x.shape))
    if channels is not None:
        require(x.shape[1] == channels, op, argument, f"have {channels} channels", x.shape[1])


def same_grid(op: str, name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """`a` and `b` share batch and spatial sizes, and the device."""
    sizes = a.shape[:1] + a.shape[-3:], b.shape[:1] + b.shape[-3:]
    require(
        sizes[0] == sizes[1], op, name_b, f"share batch and grid {tuple(sizes[0])} with '{name_a}'", tuple(sizes[1])
    )
    require(a.device == b.device, op, name_b, f"be on the device of '{name_a}' ({a.device})", b.device)


def is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex()) and x.dtype != torch.bool
