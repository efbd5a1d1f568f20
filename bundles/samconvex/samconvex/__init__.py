"""SAMConvex: coarse-to-fine discrete registration by coupled convex optimisation on a correlation pyramid."""

from common import require

require("0.2.0", "0.3.0")

from samconvex.network import MIND, SAMConvex  # noqa: E402
from samconvex.sam import SAM  # noqa: E402

__all__ = ["MIND", "SAM", "SAMConvex"]
