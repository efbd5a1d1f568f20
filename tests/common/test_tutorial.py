"""The tutorial: runs from the first cell to the last in a kernel of its own, and is committed without outputs."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "common" / "tutorial.ipynb"
ROW = re.compile(r"(\w+) +(plausible|doubtful) +landmarks ([\d.]+) -> ([\d.]+) mm, Dice ([\d.]+) -> ([\d.]+)")


def test_it_holds_no_outputs_and_no_paths() -> None:
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 8 and all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert not re.search(r"/(home|root|Users|tmp|work)\b", FILE.read_text())


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder; what it prints shows that each step has done what the text says."""
    client = pytest.importorskip("nbclient", reason="nbclient of the extra [test] is not installed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(FILE, as_version=4)
    client.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output.get("text", "") for output in outputs)
    assert not re.search("Traceback|error: ", said), said
    rows = {found[1]: [float(n) for n in found.groups()[2:]] for found in ROW.finditer(said)}
    assert set(rows) == {"plain", "refined", "trained"}
    before, after, dice_before, dice_after = rows["plain"]
    assert after < 0.7 * before and dice_after > dice_before + 0.05
    assert rows["refined"][1] < 0.9 * after and rows["refined"][3] > dice_after
    carried = float(re.search(r"mean Dice of \d+ labels: ([\d.]+)", said)[1])
    assert abs(carried - dice_after) < 0.02, "the file applied by the command gives what the run itself has warped"
    assert re.search(r"epoch 2 of 2: loss ", said)
    assert rows["trained"][0] == before > 1.2 * rows["trained"][1] and rows["trained"][3] > dice_before + 0.05
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
