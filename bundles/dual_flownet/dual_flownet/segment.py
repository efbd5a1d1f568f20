"""Stub"""
class SegmentPaird: pass
