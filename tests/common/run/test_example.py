"""The embedded pair on disk."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common import InputError
from common.run import example

FIXED = ((32, 40, 30), nib.affines.from_matvec(np.diag([4.0, 4, 4]), [-62, -78, -58]))


def test_written_files_are_kept_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, affine = FIXED
    monkeypatch.setattr(example, "grids", lambda: {"fixed": (size, affine), "moving": (size, affine)})
    row = example.write_phantom(tmp_path / "p")
    assert row["id"] == "phantom"
    assert set(row) == {"id"} | {f"{role}{kind}" for role in ("fixed", "moving") for kind in ("", "_label", "_points")}
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()}
    assert len(stamps) == 6 and example.write_phantom(tmp_path / "p") == row
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()}
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        example.write_phantom(tmp_path / "file")
