"""report.json: everything that is known about one registration, and whether to trust it."""

import json
import math
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import common
from common.quality.verdict import verdict_of

VERSIONS = {
    "common": common.__version__,
    "python": platform.python_version(),
    "torch": torch.__version__,
    "monai": version("monai"),
    "numpy": np.__version__,
    "itk": version("itk"),
}
# where the measures of a row go: section -> what its names begin with
SECTIONS = {
    "similarity": ("ncc", "nmi", "ssim", "structure"),
    "overlap": ("overlap", "dice", "hd", "assd", "labels"),
    "landmarks": ("tre", "landmarks", "guides"),
    "deformation": ("disp", "folding", "sdlogj", "inverse"),
}


def report(row: dict, details: dict[str, dict], warnings: list[str], run: dict) -> dict:
    """The report of a pair: its row by subject, the details, the verdict, and how it was made.

    Args:
        row: measures, and id, fixed, moving.
        details: what `common.quality.measure.measure` adds to the row.
        warnings: sentences; none of them makes the verdict "plausible", any "doubtful".
        run: seconds, peak_memory_mib, forecast, device, threads, network, weights, settings.
    """
    found = {name: row[name] for name in ("id", "fixed", "moving") if name in row}
    found |= {"verdict": verdict_of(warnings), "warnings": warnings, "before": details["before"]}
    for section, begins in SECTIONS.items():
        found[section] = {name: value for name, value in row.items() if name.startswith(begins) and name != "id"}
    found["overlap"] |= {"each": details["labels"]} if "labels" in details else {}
    found["landmarks"] |= {"each": details["landmarks"]} if "landmarks" in details else {}
    found["deformation"]["displacement_mm"] = details["displacement_mm"]
    return found | {"run": run | {"versions": VERSIONS}}


def write_report(content: dict, path: Path) -> None:
    """Write as JSON; what is not a finite number becomes null."""
    path.write_text(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    return value if isinstance(value, (int, str, bool, type(None))) else str(value)
