"""A bundle as a Hugging Face repository: MONAI's own download finds it, and it runs alone."""

import re
import shutil
import types
from pathlib import Path

import pytest
import yaml
from monai.bundle import ConfigParser, scripts

from common import InputError
from common.publish.hub import TAGS, publish

NAME = "sacb_net"


@pytest.fixture(scope="module")
def repository_of_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(NAME, tmp_path_factory.mktemp("hub") / NAME)


def test_monai_downloads_it(repository_of_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`download --source huggingface_hub`, with snapshot_download replaced by a copy."""
    asked = {}

    def snapshot_download(repo_id: str, revision: str | None = None, local_dir: str = "", **kwargs) -> str:
        asked.update(repo=repo_id, revision=revision)
        shutil.copytree(repository_of_hub, local_dir, dirs_exist_ok=True)
        return local_dir

    tag = types.SimpleNamespace(name="latest_version")
    refs = types.SimpleNamespace(tags=[tag], branches=[types.SimpleNamespace(name="main")])
    fake = types.SimpleNamespace(snapshot_download=snapshot_download, list_repo_refs=lambda repo_id: refs)
    monkeypatch.setattr(scripts, "huggingface_hub", fake)
    scripts.download(name=NAME, source="huggingface_hub", repo=f"somebody/{NAME}", bundle_dir=str(tmp_path))
    assert asked["repo"] == f"somebody/{NAME}"
    there = tmp_path / NAME
    parser = ConfigParser()
    parser.read_config(str(there / "configs" / "inference.json"))
    assert parser["network_def"]["_target_"] == "sacb_net.SACBNet" and (there / "sacb_net" / "network.py").is_file()
    assert (there / "models" / "model.pt").read_bytes() == (repository_of_hub / "models" / "model.pt").read_bytes()
    assert (there / "common" / "run" / "engines.py").is_file() and (there / "LICENSE").is_file()


def test_card(repository_of_hub: Path) -> None:
    """Front matter that the hub reads, and no link that leads out of the repository."""
    _, front, text = (repository_of_hub / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["library_name"] == "monai" and tuple(found["tags"]) == TAGS
    assert (repository_of_hub / found["license_link"]).is_file()
    links = [place.partition("#")[0] for place in re.findall(r"\]\(([^)\s]+)\)", text)]
    inside = [place for place in links if place and not place.startswith("http")]
    assert inside and [place for place in inside if not (repository_of_hub / place).exists()] == []


def test_mistakes(repository_of_hub: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already; give a new folder"):
        publish(NAME, repository_of_hub)
    with pytest.raises(InputError, match="--layout must be huggingface or model-zoo, got ngc"):
        publish(NAME, tmp_path / "x", layout="ngc")
    with pytest.raises(InputError, match="none: no such bundle"):
        publish("none", tmp_path / "x")
    assert not (tmp_path / "x").exists()
