"""The rest of what the Model Zoo asks of a bundle: every config, declared packages, several bundles in one process."""

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT
from monai.bundle import create_workflow

BUNDLES = sorted(path for path in (ROOT / "bundles").iterdir() if path.is_dir())
BASES = ("train.json", "inference.json", "evaluate.json", "metadata.json")
# multi_gpu_train.json needs the processes of torchrun: test_training_in_two_processes of each bundle runs it.
OVERLAYS = [
    path
    for bundle in BUNDLES
    for path in sorted((bundle / "configs").glob("*.json"))
    if path.name not in (*BASES, "multi_gpu_train.json")
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all, so that the phantom pair is made once."""
    return tmp_path_factory.mktemp("results")


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: f"{path.parents[1].name}-{path.stem}")
def test_overlays_have_all_properties(overlay: Path, results: Path) -> None:
    """Each over the config that it changes: what names a training over train.json, the others over inference.json."""
    bundle, content = overlay.parents[1], json.loads(overlay.read_text())
    training = any(key.startswith(("train::", "validate::")) or key in ("run", "loss") for key in content)
    base = "train" if training else "inference"
    workflow = create_workflow(
        config_file=[str(bundle / "configs" / f"{base}.json"), str(overlay)],
        workflow_type=base,
        bundle_root=str(bundle),
        meta_file=str(bundle / "configs" / "metadata.json"),
        output_dir=str(results),
        spacing=6.0,
        weights="",
        logging_file=False,
    )
    assert workflow.check_properties() == []


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_declared_packages_are_those_of_the_collection(bundle: Path) -> None:
    """The zip of a bundle has no setup.cfg: its metadata names what setup.cfg does, each with one existing release."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needed = {re.match(r"[\w-]+", line)[0] for line in setup["options"]["install_requires"].split("\n") if line}
    meta = json.loads((bundle / "configs" / "metadata.json").read_text())
    own = {"torch": "pytorch", "monai": "monai", "numpy": "numpy"}
    declared = meta["required_packages_version"] | {name: meta[f"{key}_version"] for name, key in own.items()}
    assert set(declared) == needed
    assert all(re.fullmatch(r"\d+(\.\d+)+", version) for version in declared.values())


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_imports_come_after_the_path(bundle: Path) -> None:
    """MONAI evaluates `imports` before anything else, when the `common` inside a zip cannot be found yet."""
    for path in (bundle / "configs").glob("*.json"):
        names = " ".join(json.loads(path.read_text()).get("imports", []))
        assert "common" not in names and bundle.name not in names, path


TOGETHER = """
import torch
from monai.bundle import create_workflow
for folder in {folders}:
    w = create_workflow(config_file=folder + "/configs/inference.json", workflow_type="inference", bundle_root=folder,
        output_dir={output!r}, logging_file=False)
    with torch.no_grad():
        print("found", type(w.network_def).__module__, tuple(w.network_def(torch.rand(1, 2, 16, 16, 16)).shape))
"""


def test_all_bundles_in_one_process(results: Path, tmp_path: Path) -> None:
    """Each runs its own network, from an empty folder; `common` is as installed (here: on the path)."""
    code = TOGETHER.format(folders=[str(path) for path in BUNDLES], output=str(results))
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line for line in done.stdout.splitlines() if line.startswith("found")]
    assert found == [f"found {path.name}.network (1, 3, 16, 16, 16)" for path in BUNDLES]
