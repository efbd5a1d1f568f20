"""Dual-FlowNet: region-aware flow, global flow, and a region consistency constraint (Ma et al.)."""

from common import require

require("0.2.0", "0.3.0")

from dual_flownet.loss import DualFlowLoss  # noqa: E402  (after the version guard)
from dual_flownet.network import DualFlowNet  # noqa: E402
from dual_flownet.segment import SegmentPaird  # noqa: E402

__all__ = ["DualFlowLoss", "DualFlowNet", "SegmentPaird"]
