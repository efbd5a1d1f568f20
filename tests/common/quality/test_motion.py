"""What a series shows: volumes by the map alone, places of landmarks, a picture."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.quality.motion import draw_motion, places, volumes_ml
from common.space import mapping
from common.space.points import Points, write_points

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


def test_volume_of_a_label_that_grows() -> None:
    codes = np.zeros((12, 12, 12), np.int32)
    codes[3:7, 3:7, 3:7], codes[8:10, 8:10, 8:10] = 4, 9
    assert volumes_ml(codes, AFFINE, None) == pytest.approx({4: 64 * 0.012, 9: 8 * 0.012})
    grown = mapping.affine_transform(np.diag([1.1, 1.2, 0.9, 1.0]))
    found = volumes_ml(codes, AFFINE, grown)
    assert found == pytest.approx({4: 64 * 0.012 * 1.188, 9: 8 * 0.012 * 1.188}, rel=1e-4)


def test_landmarks_of_every_phase(tmp_path: Path) -> None:
    write_points(Points(np.array([[1.0, 2, 3], [4, 5, 6]]), ["a", "b"]), tmp_path / "p.csv")
    shift = mapping.affine_transform(np.array([[1.0, 0, 0, -3], [0, 1, 0, 4], [0, 0, 1, 0], [0, 0, 0, 1]]))  # RAS
    rows = places(str(tmp_path / "p.csv"), AFFINE, [None, shift])
    assert rows[0] == {"phase": 0, "name": "a", "x": 1.0, "y": 2.0, "z": 3.0, "moved_mm": 0.0}
    assert rows[3] == {"phase": 1, "name": "b", "x": 7.0, "y": 1.0, "z": 6.0, "moved_mm": 5.0}


def test_picture_has_a_panel_for_labels(tmp_path: Path) -> None:
    table = [{"phase": n, "disp_mean_mm": float(n), "disp_max_mm": 2.0 * n} for n in range(4)]
    draw_motion(table, tmp_path / "one.png")
    draw_motion([line | {"volume_ml_3": 5.0 + line["phase"]} for line in table], tmp_path / "two.png")
    one, two = (Image.open(tmp_path / f"{name}.png").size for name in ("one", "two"))
    assert two[0] == 2 * one[0] and one[1] == two[1]
