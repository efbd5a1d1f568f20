"""The scans that a template is made of: found in a folder or a CSV, and each looked at once before anything begins."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common import InputError, RegistrationWarning
from common.run.data import is_scan, read_pairs, stem, unique
from common.space import geometry, io, mapping

BESIDE = ("moving_mask", "moving_lesion")  # columns of a CSV that the registrations take
NOBODY = ("rounds", "round", "shape")  # names of files of a template that no person's may have


class Person(NamedTuple):
    """One scan, as it was found."""

    id: str
    scan: str
    label: str  # "" without
    beside: dict[str, str]  # its masks, by the names of a registration's options
    grid: mapping.Grid
    ranges: list[tuple[float, float]]  # the values of each channel that become 0 and 1
    stripped: bool


def people_of(scans: str, labels: str = "", *, header: str = "", series: str = "") -> list[Person]:
    """Every scan of a folder, or of a pairs CSV without the fixed scan, with an id of its own.

    Args:
        labels: folder of label maps with the file names of the scans, "" for none, or those of the CSV.
        header, series: as of `io.read_scan`.

    Raises:
        InputError: fewer than two scans, channels that differ, what `read_pairs` and the readers refuse.
    """
    return _looked_at(_rows(scans, labels), {"header": header, "series": series})


def _rows(scans: str, labels: str) -> list[dict[str, str]]:
    """id, moving, and what there is beside it, of every scan."""
    rows = [{name: v for name, v in row.items() if name != "fixed"} for row in read_pairs(scans, {"fixed": ""})]
    if len(rows) < 2:
        raise InputError(f"{scans}: a template needs at least two scans, there is only {rows[0]['moving']}")
    if labels:
        if not os.path.isdir(labels):
            raise InputError(f"--labels {labels}: no such folder")
        names = {stem(path.name): str(path) for path in sorted(Path(labels).absolute().iterdir()) if is_scan(path)}
        if not any(stem(row["moving"]) in names for row in rows):
            raise InputError(f"--labels {labels}: holds no label map with the file name of a scan in {scans}")
        rows = [row | ({"moving_label": names[n]} if (n := stem(row["moving"])) in names else {}) for row in rows]
    taken = set(NOBODY)
    return [row | {"id": unique(row.get("id") or stem(row["moving"]), taken)} for row in rows]


def _looked_at(rows: list[dict[str, str]], reading: dict[str, str]) -> list[Person]:
    people, first = [], None
    for row in rows:
        path = row["moving"]
        with _said():
            array, affine = io.read_scan(path, **reading)
            io.refuse_constant(array, path)
            if label := row.get("moving_label", ""):
                io.read_beside(label, "label map", path, array, affine, reading["header"])
        first = first or (path, len(array))
        if len(array) != first[1]:
            raise InputError(f"{path}: has {len(array)} channels, the first scan {first[0]} has {first[1]}")
        beside = {name: row[name] for name in BESIDE if name in row}
        ranges = [geometry.foreground_range(channel) for channel in array]
        grid = array.shape[1:], affine
        people.append(Person(row["id"], path, label, beside, grid, ranges, io.is_stripped(array[0])))
    return people


@contextlib.contextmanager
def _said() -> Iterator[None]:
    """Warnings about a scan as sentences."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RegistrationWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, RegistrationWarning):
            print(f"warning: {warning.message}", file=sys.stderr)
