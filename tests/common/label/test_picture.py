"""The picture of the README. Needs no MONAI Label."""

from pathlib import Path

import numpy as np
import pytest

from common import phantom
from common.run import example

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.parametrize("role", ["fixed_label", "moving_label"])
def test_left_is_left(role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a scan is stored: the moving one of the phantom has its first two axes the other way round."""
    monkeypatch.syspath_prepend(BENCH)
    from draw_label import axial

    shown, aspect = axial(example.write_phantom(tmp_path / "phantom")[role])
    numbers = {name: number for number, name in phantom.LABELS.items()}
    rows, columns = (
        {name: axis[shown == numbers[name]].mean() for name in ("left white matter", "right white matter")}
        for axis in np.indices(shown.shape)
    )
    assert columns["left white matter"] < shown.shape[1] / 2 < columns["right white matter"]
    assert np.ptp(list(rows.values())) < np.ptp(list(columns.values()))
    front, back = (np.indices(shown.shape)[0][shown == numbers[name]].mean() for name in ("putamen", "thalamus"))
    assert front < back, "rows are counted from above"
    assert aspect == pytest.approx(1 if role == "fixed_label" else 2 / 2.2, abs=1e-4)
