"""MONAI's MetaTensors into the operators and the refinement: the same numbers, as plain tensors."""

from collections.abc import Callable

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor

from common.ops import (
    SACB,
    CorrelationPyramid,
    conv3d,
    cost_volume,
    kmeans,
    match,
    modulated_conv3d,
    norm_act,
    plain,
    pointwise,
    warp,
)
from common.refine import refine

SCAN, DISP = (1, 4, 10, 12, 14), (1, 3, 10, 12, 14)
CALLS = {
    "warp": (lambda image, disp: warp(image, disp), (SCAN, DISP)),
    "match": (lambda fixed, moving: match(fixed, moving, radius=1), (SCAN, SCAN)),
    "cost_volume": (lambda fixed, moving: cost_volume(fixed, moving, 1), (SCAN, SCAN)),
    "pyramid": (lambda fixed, moving, disp: CorrelationPyramid([fixed], [moving], [1])(0, disp), (SCAN, SCAN, DISP)),
    "kmeans": (lambda points: kmeans(points, 3)[0], ((1, 200, 4),)),
    "norm_act": (norm_act, (SCAN,)),
    "conv3d": (conv3d, (SCAN, (5, 4, 3, 3, 3), (5,))),
    "pointwise": (pointwise, (SCAN, (5, 4, 1, 1, 1), (5,))),
    "modulated_conv3d": (
        lambda x, weight, bias, taps, labels: modulated_conv3d(x, weight, bias, taps, labels.round().long()),
        (SCAN, (5, 4, 3, 3, 3), (1, 2, 5), (1, 2, 27), (1, 10, 12, 14)),
    ),
    "SACB": (lambda x: plain(SACB(4, clusters=2).eval()(x)), ((2, 4, 8, 8, 8),)),  # a layer keeps the kind, as torch's
    "refine": (lambda disp, image: refine(disp, image, 3, progress=False), (DISP, (1, 2, 10, 12, 14))),
}


@pytest.mark.parametrize("call, shapes", CALLS.values(), ids=CALLS)
def test_meta_tensors(call: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...]) -> None:
    inputs = [torch.rand(shape) for shape in shapes]
    torch.manual_seed(0)
    expected = call(*inputs)
    torch.manual_seed(0)
    found = call(*map(MetaTensor, inputs))
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_plain() -> None:
    """Shares the memory and the gradient; everything else passes."""
    x = MetaTensor(torch.ones(3))
    assert type(plain(x)) is Tensor and plain(x).data_ptr() == x.data_ptr()
    assert plain(None) is None and plain("border") == "border"
