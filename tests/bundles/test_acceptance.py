"""What the Model Zoo asks of a bundle, of every folder in bundles/: layout, metadata, properties, expressions, network.

Its commands run in the other files: from the root and the bundle's folder in test_*_runs, from its zip in test_pack, in
several processes in test_processes, exported in test_exports.
"""

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import PATIENCE
from monai.bundle import ConfigParser, create_workflow, verify_metadata, verify_net_in_out

from common.run import forecast

BUNDLES = sorted(p for p in (Path(__file__).resolve().parents[2] / "bundles").iterdir() if p.is_dir())
TEXT, OBJECT = {"type": "string"}, {"type": "object"}
NUMBERS = {"type": "array", "items": {"type": "number"}}
TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        "type": TEXT,
        "format": TEXT,
        "modality": TEXT,
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["integer", "string"]}},
        "dtype": TEXT,
        "value_range": NUMBERS,
        "is_patch_data": {"type": "boolean"},
        "channel_def": OBJECT,
    },
}
TENSORS = {"type": "object", "minProperties": 1, "additionalProperties": TENSOR}
# What meta_schema_20240725 asks for, in our words.
SCHEMA = {
    "type": "object",
    "required": [
        *("schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version"),
        *("task", "description", "authors", "copyright", "network_data_format"),
    ],
    "properties": dict.fromkeys(
        [
            *("schema", "version", "monai_version", "pytorch_version", "numpy_version", "name", "task"),
            *("description", "authors", "copyright", "data_source", "data_type", "intended_use"),
            *("image_classes", "label_classes", "pred_classes"),
        ],
        TEXT,
    )
    | dict.fromkeys(["changelog", "required_packages_version", "eval_metrics", "supported_apps"], OBJECT)
    | {
        "references": {"type": "array", "items": TEXT},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {"inputs": TENSORS, "outputs": TENSORS, "post_processed_outputs": TENSORS},
        },
    },
}


@pytest.fixture(params=BUNDLES, ids=lambda path: path.name)
def bundle(request: pytest.FixtureRequest) -> Path:
    return request.param


def configs_of(bundle: Path, *names: str) -> list[str]:
    return [str(bundle / "configs" / name) for name in names]


def metadata_of(bundle: Path) -> dict:
    return json.loads((bundle / "configs" / "metadata.json").read_text())


def network_of(bundle: Path) -> torch.nn.Module:
    parser = ConfigParser()
    parser.read_config(configs_of(bundle, "inference.json"))
    parser["bundle_root"] = str(bundle)
    return parser.get_parsed_content("network_def")


def test_layout(bundle: Path) -> None:
    name = bundle.name
    needed = ["LICENSE", "configs/metadata.json", "configs/inference.json", "configs/evaluate.json"]
    needed += ["configs/logging.conf", "docs/README.md", "models/model.pt", f"{name}/__init__.py", f"{name}/network.py"]
    assert [path for path in needed if not (bundle / path).is_file()] == []
    assert not (bundle / "scripts").exists(), "two bundles with `scripts` run the first one's network"
    assert "_v" not in name, "MONAI cuts a bundle's name at the first `_v`"
    assert (bundle / "docs" / "README.md").read_text().startswith("# ")


def test_weights_are_a_state_dict_that_fits(bundle: Path) -> None:
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    network_of(bundle).load_state_dict(state, strict=True)
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())
    assert (bundle / "models" / "model.pt").stat().st_size < 25e6, "larger files need large_files.yml"


def test_metadata_fits_the_schema(bundle: Path, tmp_path: Path) -> None:
    """MONAI's own command, with the schema in place so that nothing is downloaded; and it does refuse."""
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (meta,) = configs_of(bundle, "metadata.json")
    verify_metadata(meta_file=meta, filepath=str(tmp_path / "schema.json"))
    broken = metadata_of(bundle)
    del broken["network_data_format"]["outputs"]["pred"]["value_range"]
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="'value_range' is a required property"):
        verify_metadata(meta_file=str(tmp_path / "broken.json"), filepath=str(tmp_path / "schema.json"))


def test_metadata_says_what_we_agreed(bundle: Path) -> None:
    meta = metadata_of(bundle)
    assert meta["schema"].endswith("/meta_schema_20240725.json")
    assert meta["version"] in meta["changelog"]
    assert all(re.fullmatch(r"\d", part) for part in meta["version"].split(".")), "versions are sorted as text"
    inputs, outputs = (meta["network_data_format"][name] for name in ("inputs", "outputs"))
    assert list(inputs) == ["image"] and list(outputs) == ["pred"]
    assert inputs["image"]["channel_def"] == {"0": "moving", "1": "fixed"} and inputs["image"]["num_channels"] == 2
    assert outputs["pred"]["num_channels"] == 3 and "pytorch-ignite" in meta["required_packages_version"]


def test_network_is_the_same_in_training_and_inference(bundle: Path) -> None:
    if not (bundle / "configs" / "train.json").exists():
        pytest.skip(f"{bundle.name} is not trained")
    train, inference = (json.loads(Path(p).read_text()) for p in configs_of(bundle, "train.json", "inference.json"))
    assert train["network_def"] == inference["network_def"]


def expressions(item: object) -> list[str]:
    if isinstance(item, dict):
        return [text for value in item.values() for text in expressions(value)]
    if isinstance(item, list):
        return [text for value in item for text in expressions(value)]
    return [item] if isinstance(item, str) and item.startswith("$") else []


def test_expressions_are_short(bundle: Path) -> None:
    files = sorted((bundle / "configs").glob("*.json"))
    found = {path.name: expressions(json.loads(path.read_text())) for path in files}
    assert sum(map(len, found.values())) > 10
    assert [(name, text) for name, texts in found.items() for text in texts if len(text) > 80] == []


WORKFLOWS = {
    "train": (["train.json"], "train"),
    "inference": (["inference.json"], "inference"),
    "evaluate": (["inference.json", "evaluate.json"], "inference"),
}


@pytest.mark.parametrize("names, kind", WORKFLOWS.values(), ids=WORKFLOWS)
def test_properties_are_complete(bundle: Path, tmp_path: Path, names: list[str], kind: str) -> None:
    """check_properties instantiates everything: here on the phantom, which is what a user gets who gives nothing."""
    if not (bundle / "configs" / names[0]).exists():
        pytest.skip(f"{bundle.name} has no {names[0]}")
    workflow = create_workflow(
        config_file=configs_of(bundle, *names),
        workflow_type=kind,
        bundle_root=str(bundle),
        meta_file=str(bundle / "configs" / "metadata.json"),
        output_dir=str(tmp_path),
        spacing=4.0,
        logging_file=False,
    )
    assert workflow.check_properties() == []
    assert workflow.version == metadata_of(bundle)["version"] and workflow.network_def is not None


OVERLAYS = [
    path
    for bundle in BUNDLES
    for path in sorted((bundle / "configs").glob("*.json"))
    if path.name not in ("train.json", "inference.json", "evaluate.json", "multi_gpu_train.json", "metadata.json")
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


PROPERTIES = """
from monai.bundle import create_workflow
w = create_workflow(config_file=[{root!r} + "/configs/train.json", {root!r} + "/configs/multi_gpu_train.json"],
    workflow_type="train", bundle_root={root!r}, meta_file={root!r} + "/configs/metadata.json", output_dir={output!r},
    spacing=6.0, logging_file=False)
w.initialize()
print("missing", w.check_properties(), type(w.trainer.network).__name__)
w.finalize()
"""


def test_several_processes_have_all_properties(bundle: Path, repository: Path, results: Path, tmp_path: Path) -> None:
    """multi_gpu_train.json over train.json, in the one process of a group."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = alone | {"PYTHONPATH": str(repository), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", PROPERTIES.format(root=str(bundle), output=str(results))]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "missing [] DistributedDataParallel"


@pytest.mark.parametrize("n", [1, 2])
def test_network_takes_and_gives_what_metadata_says(bundle: Path, n: int) -> None:
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=configs_of(bundle, "inference.json"),
        device="cpu",
        n=n,
        bundle_root=str(bundle),
    )


def test_displacement_has_the_size_of_the_image(bundle: Path) -> None:
    """What verify_net_in_out leaves out; on a grid that no divisor of the network divides."""
    net = network_of(bundle).eval()
    with torch.no_grad():
        assert net(torch.rand(1, 2, 37, 42, 35)).shape == (1, 3, 37, 42, 35)


@pytest.mark.slow
def test_cost_is_that_of_the_network(bundle: Path) -> None:
    """The bytes a voxel that inference.json gives the forecast, against those that the network takes.

    Otherwise: python tests/bench/bench_forecast.py calibrate.
    """
    net, side = network_of(bundle).eval(), 64
    cost = json.loads((bundle / "configs" / "inference.json").read_text())["cost"]
    with torch.no_grad():
        _, held = forecast._timed(lambda: net(torch.rand(1, 2, *[side] * 3)), torch.device("cpu"))
    assert held / forecast.HEAP / side**3 == pytest.approx(cost["bytes"], rel=0.25) and cost["units"] > 0


def test_bundle_is_found_from_an_empty_folder(bundle: Path, repository: Path, tmp_path: Path) -> None:
    """`common` as installed (here: on PYTHONPATH); the bundle's own package by `bundle_root` alone."""
    code = (
        "from monai.bundle import create_workflow\n"
        f"w = create_workflow(config_file={str(bundle / 'configs' / 'inference.json')!r}, workflow_type='inference',\n"
        f"    bundle_root={str(bundle)!r}, logging_file=False)\n"
        "print(type(w.network_def).__module__)"
    )
    environment = {"PYTHONPATH": str(repository), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1].split(".")[0] == bundle.name


def test_declared_packages_are_those_of_the_collection(bundle: Path, repository: Path) -> None:
    """The zip of a bundle has no setup.cfg: its metadata names what setup.cfg does, each with one existing release."""
    setup = configparser.ConfigParser()
    setup.read(repository / "setup.cfg")
    needed = {re.match(r"[\w-]+", line)[0] for line in setup["options"]["install_requires"].split("\n") if line}
    meta = json.loads((bundle / "configs" / "metadata.json").read_text())
    own = {"torch": "pytorch", "monai": "monai", "numpy": "numpy"}
    declared = meta["required_packages_version"] | {name: meta[f"{key}_version"] for name, key in own.items()}
    assert set(declared) == needed
    assert all(re.fullmatch(r"\d+(\.\d+)+", version) for version in declared.values())


def test_imports_come_after_the_path(bundle: Path) -> None:
    """MONAI evaluates `imports` before anything else, when the `common` inside a zip cannot be found yet.

    `common.run.first` may be missing there: what MONAI does not find, it leaves until it is used, which nothing does.
    """
    for path in (bundle / "configs").glob("*.json"):
        words = json.loads(path.read_text()).get("imports", [])
        names = " ".join(word for word in words if word != "$import common.run.first")
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


def test_all_bundles_in_one_process(repository: Path, results: Path, tmp_path: Path) -> None:
    """Each runs its own network, from an empty folder; `common` is as installed (here: on the path)."""
    code = TOGETHER.format(folders=[str(path) for path in BUNDLES], output=str(results))
    environment = {"PYTHONPATH": str(repository), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line for line in done.stdout.splitlines() if line.startswith("found")]
    assert found == [f"found {path.name}.network (1, 3, 16, 16, 16)" for path in BUNDLES]
