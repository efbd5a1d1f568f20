"""The pictures of the model cards and of the README: what draws them, and that the cards show them."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.run import example
from common.space import mapping, transform_files

ROOT = Path(__file__).resolve().parents[1]
CARDS = sorted((ROOT / "bundles").glob("*/docs/README.md"))
PICTURES = [*(path.with_name("result.png") for path in CARDS), ROOT / "common" / "registration.png"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    import draw_methods

    with draw_methods.plt.rc_context(draw_methods.STYLE):
        yield draw_methods
    sys.modules.pop("draw_methods")


def test_drawing_shows_the_files(bench, tmp_path: Path) -> None:
    """Of a map that moves nothing and of the fixed scan as the warped one."""
    report = example.write_phantom(tmp_path / "input")
    marks = [{"tre_mm_before": 2.0, "tre_mm_after": after} for after in (0.5, 3.0)]
    report |= {"landmarks": {"each": marks}}
    transform_files.write_transform(mapping.affine_transform(np.eye(4)), tmp_path / "transform.h5")
    shutil.copy(report["fixed"], tmp_path / "warped.nii.gz")
    drawing = bench.Drawing(tmp_path, report)
    inside = drawing.fixed > 0
    assert drawing.fixed.shape == drawing.disp.shape[1:] and not drawing.disp.any()
    assert np.corrcoef(drawing.after[inside], drawing.fixed[inside])[0, 1] > 0.999, "on one grid"
    as_it_lies = drawing.resampled(report["moving"])
    assert np.corrcoef(drawing.before[inside], as_it_lies[inside])[0, 1] > 0.98, "before is where the map begins"
    assert np.corrcoef(drawing.before[inside], drawing.fixed[inside])[0, 1] < 0.9
    sizes = {"phantom.png": (1440, 936), "real.png": (1440, 810)}
    bench.draw_phantom(drawing, report, "a title", tmp_path / "phantom.png")
    bench.draw_real(drawing, "a title", "a credit", tmp_path / "real.png")
    for name, size in sizes.items():
        picture = Image.open(tmp_path / name)
        assert picture.size == size and len(np.unique(picture)) > 30


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_picture_is_there_and_small(path: Path) -> None:
    assert Image.open(path).size[0] == 1440 and path.stat().st_size < 300_000


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parents[1].name)
def test_card(path: Path) -> None:
    """Name, a sentence, the picture; links lead to files and headings; prose is at most 160 columns wide."""
    text = path.read_text()
    lines = [line for line in text.splitlines() if line]
    assert lines[0].startswith("# ") and lines[2].startswith("![") and "(result.png)" in lines[2]
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[-1] == "How the weights were trained" and "Numbers" in headings
    anchors = {re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in headings}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        place, _, anchor = target.partition("#")
        assert place.startswith("https://") or (path.parent / place).exists(), target
        assert place or anchor in anchors, target
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines()
    assert [line for line in prose if len(line) > 160 and not line.startswith(("|", "!["))] == []
