"""SACB-Net: spatial-awareness convolutions for medical image registration (CVPR 2025)."""

import common

common.require("0.2.0", "0.3.0")

from sacb_net.checkpoint import from_official  # noqa: E402  (after the version guard)
from sacb_net.network import SACBNet  # noqa: E402

__all__ = ["SACBNet", "from_official"]
