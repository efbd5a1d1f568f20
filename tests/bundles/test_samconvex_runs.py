"""SAMConvex through the commands that a user types: training of its features, registration, what it warns of."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import ROOT, SPACING, bundle_configs, centred, command, succeeded, table, write

from common import phantom

pytestmark = pytest.mark.slow

BUNDLE = ROOT / "bundles" / "samconvex"
SMALL = "--sizes", "[16, 12, 12]", "--epoch_length", 2


def from_root(*configs: str) -> tuple[str, ...]:
    return bundle_configs("samconvex", *configs)


def train(configs: tuple[str, ...], data: Path, output: Path, epochs: int, launcher: str = "fork") -> str:
    options = "--dataset_dir", data, "--output_dir", output, "--max_epochs", epochs, "--minimum", 5
    return succeeded(command(*from_root(*configs), *options, "--spacing", SPACING, *SMALL, launcher=launcher))


def check_training(output: Path, epochs: int) -> None:
    assert [path.name for path in output.glob("models/checkpoint*")] == [f"checkpoint_epoch={epochs}.pt"]
    assert list(output.glob("tensorboard/events*")), "nothing for TensorBoard"
    best = json.loads((output / "models" / "model.json").read_text())
    assert 1 <= best["epoch"] <= epochs and 0.2 < best["mean_dice"] < 1
    states = [torch.load(path / "models" / "model.pt", weights_only=True) for path in (output, BUNDLE)]
    assert {n: v.shape for n, v in states[0].items()} == {n: v.shape for n, v in states[1].items()}
    assert all(torch.isfinite(value).all() for value in states[0].values())
    assert any(not torch.equal(states[0][name], value) for name, value in states[1].items())


def test_training_of_the_features_starts_and_goes_on(dataset: Path, tmp_path: Path) -> None:
    first = train(("train.json",), dataset, tmp_path / "out", 1)
    assert "going on from" not in first and "mean_dice" in first
    check_training(tmp_path / "out", 1)
    second = train(("train.json",), dataset, tmp_path / "out", 2)
    assert "checkpoint_epoch=1.pt" in second and "epoch 2 of 2:" in second and "epoch 1 of 2:" not in second
    check_training(tmp_path / "out", 2)


def test_training_on_scans_of_any_size(tmp_path: Path) -> None:
    """A folder, no labels, every scan on its own grid; only the pairs of the validation are aligned."""
    scans = tmp_path / "scans"
    scans.mkdir()
    for seed, size in enumerate(((28, 32, 26), (24, 30, 34), (30, 26, 28))):
        turned = nib.eulerangles.euler2mat(0.1 * seed, 0, -0.1 * seed) @ np.diag([6.0, 5 + seed, 6])
        write(scans, f"p{seed}", size, centred(size, turned), seed, phantom.Deformation(seed))
        (scans / f"p{seed}_label.nii.gz").unlink()
    options = "--dataset_dir", scans, "--output_dir", tmp_path, "--spacing", 6, "--max_epochs", 1
    options += "--prealign", "affine"
    done = command(*from_root("train.json"), *options, *SMALL)
    assert json.loads((tmp_path / "models" / "model.json").read_text())["mean_dice"] is None, succeeded(done)


def test_training_in_two_processes(dataset: Path, tmp_path: Path) -> None:
    text = train(("train.json", "multi_gpu_train.json"), dataset, tmp_path / "out", 1, "ranks")
    assert text.count("epoch 1 of 1: loss") == 1, "one writes the log"
    check_training(tmp_path / "out", 1)


@pytest.mark.parametrize("features", ("sam", "mind"))
def test_registration_from_the_bundle_folder(raw: Path, tmp_path: Path, features: str) -> None:
    similarity = {"sam": "features", "mind": "mind"}[features]
    done = command(
        *("--config_file", "configs/inference.json", "--pairs", raw / "pairs.csv", "--output_dir", tmp_path),
        *("--spacing", 4.0, "--features", features, "--refine_steps", 5, "--refine_similarity", similarity),
        cwd=BUNDLE,
    )
    assert "2 pairs registered" in succeeded(done)
    for row in table(tmp_path / "results.csv"):
        assert float(row["ncc_after"]) > float(row["ncc_before"]) > 0.2 and float(row["folding_pct"]) < 0.5
        assert {"warped.nii.gz", "transform.h5"} <= {path.name for path in (tmp_path / row["id"]).iterdir()}


def test_evaluation_of_a_dataset(dataset: Path, tmp_path: Path) -> None:
    configs = from_root("inference.json", "evaluate.json")
    options = "--dataset_dir", dataset, "--output_dir", tmp_path, "--spacing", SPACING, "--minimum", 5
    assert "2 pairs registered" in succeeded(command(*configs, *options))
    for row in table(tmp_path / "results.csv"):
        assert float(row["dice_after"]) > float(row["dice_before"]) and float(row["hd95_after"]) > 0


def test_what_it_warns_of_is_in_table_and_report(raw: Path, tmp_path: Path) -> None:
    """Masks that leave nothing of each other; and one level with a narrow window for scans that lie apart."""
    pair = "--moving", raw / "moving.nii.gz", "--fixed", raw / "fixed.nii.gz"
    masks = "--fixed_mask", raw / "left.nii.gz", "--moving_mask", raw / "right.nii.gz"
    options = "--prealign", "none", "--spacing", 4.0, "--network_def#radii", "[1]", "--refine_steps", 2
    told = {"moves to the edge of the search range": (), "the masks leave no voxel to compare": masks}
    for number, (part, more) in enumerate(told.items()):
        folder = tmp_path / str(number)
        text = succeeded(command(*from_root("inference.json"), *pair, *more, *options, "--output_dir", folder))
        (row,) = table(folder / "results.csv")
        report = json.loads((folder / row["id"] / "report.json").read_text())
        assert report["verdict"] == "doubtful"
        assert part in row["warnings"] and part in text and any(part in warning for warning in report["warnings"])
        assert np.isfinite([float(row[name]) for name in ("folding_pct", "sdlogj", "seconds")]).all()
        assert np.isfinite(nib.load(folder / row["id"] / "displacement.nii.gz").get_fdata()).all()


REFUSED = {
    "similarity": (
        "--refine_similarity",
        "mi",
        "error: --refine_similarity must be one of lncc, mind, features, auto, got mi",
    ),
    "features": ("--features", "SAM", "error: --features must be one of sam, mind, got SAM; did you mean sam?"),
    "option": ("--moving_lable", "x", "error: --moving_lable: there is no such option, did you mean --moving_label?"),
    "device": ("--device", "cuda:99", "error: --device cuda:99: "),
}


@pytest.mark.parametrize("name, value, sentence", REFUSED.values(), ids=REFUSED)
def test_wrong_options_are_refused(raw: Path, tmp_path: Path, name: str, value: str, sentence: str) -> None:
    pair = "--moving", raw / "moving.nii.gz", "--fixed", raw / "fixed.nii.gz", "--output_dir", tmp_path / "out"
    done = command(*from_root("inference.json"), *pair, name, value)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(sentence), done.stderr[-2000:]
    assert not (tmp_path / "out").exists()
