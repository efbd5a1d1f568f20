"""report.json: everything that is known about one registration, and whether to trust it."""

import datetime
import json
import math
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import common
from common.quality.verdict import verdict_of
from common.space.files import sha256_of
from common.space.io import contrasts_of

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
    "similarity": ("ncc", "nmi", "ssim", "structure", "quick"),
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
    made = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return found | {"run": run | {"date": made, "versions": VERSIONS}}


def inputs_of(given: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """The files that a result was made from, with their SHA-256: {"moving": {"file": ..., "sha256": ...}, ...}.

    Args:
        given: path, or None, by the role of each; of several contrasts, what `io.contrasts_of` takes.
    """
    found = {}
    for role, name in given.items():
        files = [os.path.abspath(part) for part in contrasts_of(str(name))] if name else []
        if files and all(os.path.isfile(file) or os.path.isdir(file) for file in files):  # a pipe would be waited for
            known = [{"file": file, "sha256": sha256_of(file)} for file in files]
            found[role] = known[0] if len(known) == 1 else known
    return found


def names_of(content: dict) -> tuple[str, str]:
    """The moving and the fixed scan of a report, without their folders."""
    return tuple(Path(str(content.get(role, ""))).name for role in ("moving", "fixed"))


def method_of(run: dict) -> str:
    """Method, weights, version of this software and date in words, as far as a report's run says."""
    networks = [item for item in run.get("settings") or [] if isinstance(item, dict) and "network" in item]
    found = []
    if networks:
        steps = [part for item in run["settings"] if isinstance(item, dict) for part in item.values()]
        steps = [part["refine_steps"] for part in steps if isinstance(part, dict) and part.get("refine_steps")]
        found.append(networks[0]["network"] + (f" and {steps[0]} steps" if steps else ""))
        file = networks[0].get("file")
        found.append(f"weights {Path(file).name} {networks[0]['sha256'][:8]}" if file else "no weights")
    elif "transform" in run:
        found.append(f"transform {Path(run['transform']).name}")
    return ", ".join([*found, f"version {VERSIONS['common']}", run.get("date", "")[:16].replace("T", " ")]).rstrip(", ")


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
