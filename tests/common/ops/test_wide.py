"""Kernels count in int32, and in int64 where a volume has more values than that: the same bits either way."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from common.ops import conv3d, cost_volume, match, modulated_conv3d, warp
from common.ops.box import box_sum
from common.ops.scale import box_mean, double, halve

SIZE = (4, 6, 2)
LABELS = torch.arange(2 * 4 * 6 * 2).view(2, *SIZE) % 3
CALLS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "box_sum": (lambda x: box_sum(x, 3, backend="triton"), ((2, 3, *SIZE),)),
    "conv3d": (lambda x, w: conv3d(x, w, backend="triton"), ((2, 3, *SIZE), (4, 3, 3, 3, 3))),
    "cost_volume": (lambda x, y: cost_volume(x, y, 1, backend="triton").detach(), ((2, 3, *SIZE),) * 2),
    "halve": (lambda x: halve(x, backend="triton"), ((2, 3, *SIZE),)),
    "double": (lambda x: double(x, backend="triton"), ((2, 3, *SIZE),)),
    "box_mean": (lambda x: box_mean(x.detach(), backend="triton"), ((2, 3, *SIZE),)),
    "match": (lambda x, y: match(x, y, backend="triton"), ((2, 3, *SIZE),) * 2),
    "modulated_conv3d": (
        lambda x, w, b, m: modulated_conv3d(x, w, b, m, LABELS.to(x.device), backend="triton"),
        ((2, 3, *SIZE), (4, 3, 3, 3, 3), (2, 3, 4), (2, 3, 27)),
    ),
    "warp": (lambda x, d: warp(x, d, padding="zeros", backend="triton"), ((2, 3, *SIZE), (2, 3, *SIZE))),
}


@pytest.mark.parametrize("name", CALLS)
def test_same_bits(name: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    call, shapes = CALLS[name]
    given = [torch.randn(shape, device=kernel_device).requires_grad_() for shape in shapes]
    found = []
    for widest in (2**31 - 2**20, 0):
        monkeypatch.setattr("common.ops._triton.WIDE", widest)
        value = call(*given)
        slopes = torch.autograd.grad(value.square().sum(), given) if value.requires_grad else ()
        found.append((value.detach(), *slopes))
    for narrow, wide in zip(*found):
        assert narrow.isfinite().all() and torch.equal(narrow, wide)
