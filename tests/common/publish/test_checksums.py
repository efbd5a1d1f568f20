"""The SHA-256 of shipped weights: in metadata.json, those of the files, and compared when weights are loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from common.publish.checksums import KEY, checksums, write_checksums
from common.run.engines import load_weights

ROOT = Path(__file__).resolve().parents[3]
BUNDLES = sorted(path for path in (ROOT / "bundles").iterdir() if path.is_dir())


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_metadata_names_the_files_that_are_there(bundle: Path) -> None:
    """After new weights: python -m common.publish.checksums."""
    told = json.loads((bundle / "configs" / "metadata.json").read_text())[KEY]
    assert told == checksums(bundle) and "models/model.pt" in told


def small_bundle(folder: Path) -> tuple[Path, torch.nn.Module]:
    bundle, network = folder / "small", torch.nn.Linear(2, 1)
    (bundle / "configs").mkdir(parents=True)
    (bundle / "models").mkdir()
    torch.save(network.state_dict(), bundle / "models" / "model.pt")
    (bundle / "configs" / "inference.json").write_text("{}")
    (bundle / "configs" / "metadata.json").write_text('{\n    "version": "1",\n    "monai_version": "1.6.1"\n}\n')
    return bundle, network


def test_written_where_nothing_else_changes(tmp_path: Path) -> None:
    bundle, _ = small_bundle(tmp_path)
    before = (bundle / "configs" / "metadata.json").read_text()
    text = write_checksums(bundle).read_text()
    assert json.loads(text)[KEY] == checksums(bundle) and len(checksums(bundle)["models/model.pt"]) == 64
    assert json.loads(text) == json.loads(before) | {KEY: checksums(bundle)}
    assert write_checksums(bundle).read_text() == text


def test_loading_compares(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bundle, network = small_bundle(tmp_path)
    file = bundle / "models" / "model.pt"
    write_checksums(bundle)
    assert load_weights(network, file).weights["as_published"] is True and not capsys.readouterr().err
    torch.save({name: value + 1 for name, value in network.state_dict().items()}, file)
    assert load_weights(network, file).weights["as_published"] is False
    said = f"warning: {file}: not the file that the bundle's metadata.json names; the report says so\n"
    assert capsys.readouterr().err == said
    shutil.copy(file, tmp_path / "own.pt")
    assert load_weights(network, tmp_path / "own.pt").weights["as_published"] is None and not capsys.readouterr().err
