"""What MONAI's Model Zoo checks of a contribution: its ci/verify_bundle.py and verify_hf_model.py, DCO, sizes.

Properties, shapes and exports of verify_bundle.py are in tests/bundles/test_acceptance.py and test_exports.py.
"""

import json
import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
from monai.bundle import verify_metadata

from common import InputError
from common.publish.hub import ZOO_SCHEMA, publish
from common.publish.pack import pack

ROOT = Path(__file__).resolve().parents[3]
BUNDLES = sorted(path.name for path in (ROOT / "bundles").iterdir() if path.is_dir())
LARGEST = 25 * 2**20  # bytes of a file in the zoo
PERSONAL = re.compile(r"/(home|root|Users|mnt|scratch)/|[A-Z]:\\\\|@(gmail|outlook)\.")
TEXT = (".json", ".py", ".md", ".txt", ".conf", ".yml", "LICENSE")
NEEDED = ["schema", "version", "changelog", "monai_version", "pytorch_version", "numpy_version", "name", "task"]
NEEDED += ["required_packages_version", "description", "authors", "copyright", "huggingface_url"]
SCHEMA = {  # what meta_schema_hf_20250321 asks for beside a bundle's, in our words
    "type": "object",
    "required": NEEDED,
    "properties": {
        "changelog": {"type": "object", "minProperties": 1},
        "huggingface_url": {"type": "string", "pattern": "^https://huggingface.co/[^/]+/[^/]+$"},
        "version": {"type": "string"},
    },
}


@pytest.fixture(params=BUNDLES, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def alone(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/NAME as the zoo would hold it: the zip, unpacked."""
    folder = tmp_path_factory.mktemp("models")
    zipfile.ZipFile(pack(name, output=folder / "dist")[0]).extractall(folder)
    return folder / name


def check_version(metadata: dict) -> None:
    """`verify_version_changes` of both scripts."""
    assert metadata["version"] in metadata["changelog"]
    assert re.fullmatch(r"\d\.\d\.\d", metadata["version"]), "formal and of single digits"
    pins = [metadata[f"{package}_version"] for package in ("monai", "pytorch", "numpy")]
    pins += metadata["required_packages_version"].values()
    assert [pin for pin in pins if not re.fullmatch(r"\d+(\.\d+)+(\.post\d+)?", pin)] == [], "become == in the zoo"


def check_files(folder: Path) -> None:
    """Sizes, and nothing that leads to the machine of the one who made it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    listed = (folder / "large_files.yml").read_text() if (folder / "large_files.yml").is_file() else ""
    large = [path for path in files if path.stat().st_size > LARGEST]
    assert [path for path in large if str(path.relative_to(folder)) not in listed] == []
    texts = [path for path in files if path.name.endswith(TEXT)]
    personal = [(path, found[0]) for path in texts if (found := PERSONAL.search(path.read_text(encoding="utf-8")))]
    assert texts and personal == []


def test_bundle_directory(name: str, alone: Path) -> None:
    """`verify_bundle_directory`: needed and preferred files, by their exact names."""
    needed = ["LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt", "docs/README.md"]
    assert [path for path in needed if not (alone / path).is_file()] == []
    check_version(json.loads((alone / "configs" / "metadata.json").read_text()))
    check_files(alone)
    assert "Apache License" in (alone / "LICENSE").read_text()


def test_name(name: str) -> None:
    """Lower case words, which the zoo's NAME_vVERSION can be told from."""
    assert re.fullmatch("[a-z0-9]+(_[a-z0-9]+)*", name) and "_v" not in name
    assert json.loads((ROOT / "bundles" / name / "configs" / "metadata.json").read_text())["name"] != name


def test_entry_of_the_zoo(name: str, tmp_path: Path) -> None:
    """hf_models/NAME: `verify_hf_model_directory`, the version, the metadata, the address; links lead to the hub."""
    entry = publish(name, tmp_path / "hf_models" / name, layout="model-zoo", repo=f"somebody/{name}")
    assert sorted(path.name for path in entry.iterdir()) == ["LICENSE", "README.md", "metadata.json"]
    metadata = json.loads((entry / "metadata.json").read_text())
    check_version(metadata)
    check_files(entry)
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    verify_metadata(meta_file=str(entry / "metadata.json"), filepath=str(tmp_path / "schema.json"))
    assert metadata["huggingface_url"] == f"https://huggingface.co/somebody/{name}" and metadata["schema"] == ZOO_SCHEMA
    text = (entry / "README.md").read_text()
    places = re.findall(r"\]\(([^)\s]+)\)", text)
    assert places and [place for place in places if not re.match("https?://|#", place)] == []
    assert f"[somebody/{name}](https://huggingface.co/somebody/{name})" in text
    inside = [place.partition("/blob/main/")[2].partition("#")[0] for place in places if "/blob/main/" in place]
    files = publish(name, tmp_path / "hub", layout="huggingface")
    assert inside and [place for place in inside if not (files / place).exists()] == []


def test_commit_is_signed_off(tmp_path: Path) -> None:
    """The line of common/publish/README.md makes a commit with which DCO is content: signed off by its author."""
    text = (ROOT / "common" / "publish" / "README.md").read_text()
    (line,) = re.findall(r"^git commit .*$", text, re.MULTILINE)
    publish("sacb_net", tmp_path / "hf_models" / "sacb_net", layout="model-zoo", repo="somebody/sacb_net")
    ann = {"NAME": "Ann Author", "EMAIL": "ann@example.org"}
    who = {f"GIT_{role}_{kind}": value for role in ("AUTHOR", "COMMITTER") for kind, value in ann.items()}
    for command in ("git init -q .", "git add hf_models", line):
        subprocess.run(command, shell=True, cwd=tmp_path, env=os.environ | who, check=True, capture_output=True)
    said = subprocess.run(["git", "log", "-1", "--format=%an <%ae>%n%B"], cwd=tmp_path, capture_output=True, text=True)
    author, *body = said.stdout.splitlines()
    assert f"Signed-off-by: {author}" in body


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--repo must be OWNER/NAME on Hugging Face, got nothing"):
        publish("sacb_net", tmp_path / "x", layout="model-zoo")
    assert list(tmp_path.iterdir()) == []
