"""The pages: a README of one reading, links that lead somewhere, every option explained, examples that can be read."""

import json
import pkgutil
import re
from pathlib import Path

import pytest
from printed_lines import lines_of, the_line

import common
from common.run.data import dataset_pairs, read_dataset, read_pairs
from common.train.data import training_pairs, validation_pairs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("common/**/README.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
IN_TEXT, BELOW = r"\]\(([^)\s]+)\)", r"^\[[^]]+\]: (\S+)$"  # [words](place), and [words]: place


def without_code(path: Path) -> str:
    return re.sub(r"```.*?```|`[^`\n]+`", "", path.read_text(), flags=re.DOTALL)


def headings(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", words.lower()).replace(" ", "-") for words in found}


def test_readme_is_one_reading() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert [(number, len(line)) for number, line in enumerate(lines, 1) if len(line) > 160] == []


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_links_lead_somewhere(path: Path) -> None:
    text = without_code(path)
    broken = []
    for place in re.findall(IN_TEXT, text) + re.findall(BELOW, text, re.MULTILINE):
        if re.match(r"https?://", place):
            continue
        name, _, anchor = place.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in headings(target)):
            broken.append(place)
    assert broken == []


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_references_have_their_place(path: Path) -> None:
    text = without_code(path)
    assert set(re.findall(r"\]\[(\w+)\]", text)) == set(re.findall(r"^\[([^]]+)\]: ", text, re.MULTILINE))


def test_every_option_is_explained() -> None:
    """Of the inference of every bundle, in the tables of common/run/README.md."""
    text = (ROOT / "common" / "run" / "README.md").read_text()
    explained = set(re.findall(r"`--(\w+)", "\n".join(re.findall(r"^\| (.*?) \|", text, re.MULTILINE))))
    for path in sorted(ROOT.glob("bundles/*/configs/inference.json")):
        config = json.loads(path.read_text())
        options = {name for name, value in config.items() if not isinstance(value, (dict, list))} - {"bundle_root"}
        assert len(options) > 20 and options - explained == set(), path


def test_example_of_a_dataset(tmp_path: Path) -> None:
    """That of common/train/README.md means what is said below it."""
    (example,) = re.findall(r"```json\n(.*?)```", (ROOT / "common" / "train" / "README.md").read_text(), re.DOTALL)
    (tmp_path / "dataset.json").write_text(example)
    found = read_dataset(str(tmp_path))
    assert [len(found[part]) for part in ("training", "validation", "test")] == [2, 2, 0]
    assert training_pairs(str(tmp_path)) == [("p01", "p02")]
    assert validation_pairs(str(tmp_path)) == [("p03", "p04")]
    (row,) = dataset_pairs(str(tmp_path))
    assert row["moving"] == str(tmp_path / "p03.nii.gz") and row["fixed_label"] == str(tmp_path / "p04_label.nii.gz")


def test_example_of_pairs(tmp_path: Path) -> None:
    """That of common/run/README.md."""
    (example,) = re.findall(r"```\n(id,fixed.*?)```", (ROOT / "common" / "run" / "README.md").read_text(), re.DOTALL)
    (tmp_path / "pairs.csv").write_text(example)
    (row,) = read_pairs(str(tmp_path / "pairs.csv"))
    named = {"fixed": "p1/now.nii.gz", "moving": "p1/then.nii.gz", "moving_label": "p1/then_label.nii.gz"}
    assert row == {"id": "p1"} | {name: str(tmp_path / place) for name, place in named.items()}


def test_versions_agree() -> None:
    assert f"\nversion: {common.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == common.__version__


def test_moved_names_are_there() -> None:
    """The right column of the changelog's table, where it names one thing."""
    rows = re.findall(r"^\| `common.+?\| `([\w.]+)` \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert len(rows) > 4
    assert [name for name in rows if pkgutil.resolve_name(name) is None] == []  # or it raises


def test_powershell_lines_are_those_of_bash(tmp_path: Path) -> None:
    """A line for PowerShell is read as the line for bash is; README.md has both."""
    page = tmp_path / "page.md"
    page.write_text('```powershell\n$B = "bundles/x"\npython -m monai.bundle run --config_file $B/a.json\n```\n')
    words = ["python", "-m", "monai.bundle", "run", "--config_file", "bundles/x/a.json"]
    assert the_line("python", page) == words
    text = (ROOT / "README.md").read_text()
    page.write_text("".join(re.findall(r"```powershell\n.*?```\n", text, re.DOTALL)))
    of_powershell = list(lines_of(page))
    page.write_text("".join(re.findall(r"```bash\n.*?```\n", text, re.DOTALL)))
    assert of_powershell and set(of_powershell) <= set(lines_of(page))
