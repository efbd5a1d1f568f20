"""Scans stored in any axis order, unequal voxels, turned in space: a handful of tests/bench/bench_orientations.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
bench = pytest.importorskip("bench_orientations", reason="SimpleITK of the extra [test] is not installed")

KINDS = ("unequal oblique", "unequal straight"), ("equal oblique", "unequal oblique")
ORDERS = ((0, 0), (13, 38), (46, 7))


@pytest.mark.slow
@pytest.mark.parametrize("fixed, moving", KINDS)
def test_the_result_is_that_of_itk_and_of_ras(tmp_path: Path, fixed: str, moving: str) -> None:
    """ITK alone finds what was written; a copy stored in another order is registered as the one stored as RAS."""
    rows = bench.check([(fixed, moving, *order) for order in ORDERS], tmp_path)
    assert len({row["fixed"] for row in rows}) == len({row["moving"] for row in rows}) == len(ORDERS)
    for row in rows:
        assert {name: row[name] for name, limit in bench.LIMITS.items() if not row[name] <= limit} == {}, row
