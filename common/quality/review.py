"""OUT/index.html: a cohort to review in a browser, the most suspicious pair first."""

import datetime
import json
import re
from pathlib import Path
from urllib.parse import quote

import numpy as np

import common
from common.quality.page import reasons_of, render
from common.quality.verdict import joined, parted, verdict_of

COLUMNS = {  # of a row: words, digits, whether high is good (1), bad (-1), or neither
    "structure_after": ("structure", 3, 1),
    "ncc_after": ("correlation", 3, 1),
    "dice_after": ("Dice", 3, 1),
    "tre_mm_after": ("TRE, mm", 2, -1),
    "folding_pct": ("folding, %", 3, -1),
    "inverse_failed_pct": ("not one-to-one, %", 2, -1),
    "sdlogj": ("SDlogJ", 2, -1),
    "disp_mean_mm": ("mm moved", 1, 0),
    "overlap": ("overlap", 2, 1),
}


def write_review(folder: Path, rows: list[dict], path: Path, *, neurological: bool = False) -> None:
    """The page of a cohort.

    Args:
        folder: OUT, in which a pair's folder has its id as name.
        rows: those of results.csv; "error" of a pair that failed, "warnings" of a doubtful one.
        path: file to write.
        neurological: the patient's left on the left, at first.
    """
    numbers = {name: [_number(row.get(name)) for row in rows] for name in COLUMNS}
    numbers = {name: values for name, values in numbers.items() if any(v is not None for v in values)}
    fences = {name: _fences(values, COLUMNS[name][2]) for name, values in numbers.items()}
    lines = []
    for n, row in enumerate(rows):
        odd = {name: _outside(numbers[name][n], fences[name]) for name in numbers}
        error, warnings = row.get("error") or "", row.get("warnings") or ""
        reasons = reasons_of(parted(warnings), row)
        verdict = "failed" if error else verdict_of(reasons)
        suspicion = 1000 * (verdict == "failed") + 10 * len(reasons) + sum(odd.values())
        cells = {
            name: {"text": _text(values[n], COLUMNS[name][1]), "value": _text(values[n], 6), "odd": odd[name]}
            for name, values in numbers.items()
        }
        files = {kind: folder / str(row["id"]) / file for kind, file in (
            ("thumbnail", "thumbnail.webp"), ("page", "report.html"), ("picture", "report.png"))}
        here = {} if error else {kind: file for kind, file in files.items() if file.is_file()}
        there = {kind: f"{quote(str(row['id']))}/{file.name}" for kind, file in here.items()}
        lines.append(
            {"id": row["id"], "verdict": verdict, "reasons": [error] if error else reasons}
            | {"suspicion": suspicion, "cells": cells}
            | {"thumbnail": there.get("thumbnail"), "page": there.get("page", there.get("picture"))}
        )
    for place, line in enumerate(sorted(lines, key=_by_name)):
        line["order"] = place
    words = ("plausible", "doubtful", "failed")
    lines.sort(key=lambda line: -line["suspicion"])
    values = {
        "rows": lines,
        "columns": [(name, COLUMNS[name][0]) for name in numbers],
        "plots": [_plot(name, numbers[name], fences[name], rows) for name in numbers],
        "counts": {word: sum(line["verdict"] == word for line in lines) for word in words},
        "neurological": neurological,
        "date": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        "maker": f"monai-registration-bundles {common.__version__}",
    }
    path.write_text(render("cohort", values), encoding="utf-8")


def rows_of(folder: Path) -> list[dict]:
    """Rows of the pairs whose report.json is in a folder of OUT."""
    rows = []
    for path in sorted(folder.glob("*/report.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        row = {name: value for part in found.values() if isinstance(part, dict) for name, value in part.items()}
        rows.append(row | {"id": path.parent.name, "warnings": joined(found.get("warnings", []))})
    return rows


def _by_name(line: dict) -> list:
    """Key by which pair2 comes before pair10."""
    parts = re.split(r"(\d+)", str(line["id"]).casefold())
    return [int(part) if n % 2 else part for n, part in enumerate(parts)]


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and np.isfinite(value) else None


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _fences(values: list[float | None], good: int) -> tuple[float, float]:
    """Beyond which a value lies far from the rest, on the bad side: 1.5 quartile ranges off (Tukey)."""
    known = [v for v in values if v is not None]
    low, high = np.percentile(known, [25, 75])
    reach = 1.5 * (high - low)
    return (low - reach if good >= 0 else -np.inf), (high + reach if good <= 0 else np.inf)


def _outside(value: float | None, fences: tuple[float, float]) -> bool:
    return value is not None and not fences[0] <= value <= fences[1]


def _plot(name: str, values: list[float | None], fences: tuple[float, float], rows: list[dict]) -> dict:
    """A strip of dots, the pairs side by side where they are many."""
    known = [v for v in values if v is not None]
    low, high = min(known), max(known)
    heights, dots = {}, []
    for value, row in zip(values, rows):
        if value is None:
            continue
        x = round(12 + 126 * (value - low) / (high - low or 1), 1)
        level = heights[round(x / 6)] = heights.get(round(x / 6), -1) + 1
        dot = {"id": row["id"], "x": x, "y": 46 - 4 * (level % 11), "value": _text(value, 3)}
        dots.append(dot | {"odd": _outside(value, fences)})
    digits = COLUMNS[name][1]
    return {"words": COLUMNS[name][0], "dots": dots, "low": _text(low, digits), "high": _text(high, digits)}
