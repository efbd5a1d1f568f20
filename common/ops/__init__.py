"""The operators that the collection is named for; one folder each, the formula in its reference.py.

May import: torch, and triton in `kernel.py`; nothing else of `common`.
"""

from common.ops._dispatch import plain
from common.ops.box import box_sum
from common.ops.conv import conv3d, pointwise
from common.ops.cost_volume import CorrelationPyramid, cost_volume
from common.ops.kmeans import kmeans
from common.ops.match import match
from common.ops.norm_act import norm_act
from common.ops.sacb import SACB, modulated_conv3d
from common.ops.warp import warp

__all__ = [
    "CorrelationPyramid",
    "SACB",
    "box_sum",
    "conv3d",
    "cost_volume",
    "kmeans",
    "match",
    "modulated_conv3d",
    "norm_act",
    "plain",
    "pointwise",
    "warp",
]
