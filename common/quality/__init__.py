"""What is known about a result: measures, verdict, report and pictures of one registration, whatever tool made it.

Knows no network and no run.
May import: `common.space`, the science (`common.fields`, ...), `common.ops`.
"""
