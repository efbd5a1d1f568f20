"""Residual Aligner Network: motion-aware, multi-head, coarse-to-fine registration (Zheng et al., 2022)."""

from common import require

require("0.2.0", "0.3.0")

from residual_aligner.checkpoint import from_official  # noqa: E402  (after the version guard)
from residual_aligner.loss import BothDirections  # noqa: E402
from residual_aligner.network import RAN  # noqa: E402

__all__ = ["RAN", "BothDirections", "from_official"]
