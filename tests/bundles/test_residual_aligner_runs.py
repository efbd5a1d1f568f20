"""RAN through the commands that a user types: both stages of the training, inference, evaluation, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, SPACING, bundle_configs, check_refusal, command, faults, succeeded, table
from monai.bundle import ConfigParser

from common.run.data import stem

pytestmark = pytest.mark.slow

BUNDLE = ROOT / "bundles" / "residual_aligner"
COARSE = 9  # mm: 16x20x16 voxels of the synthetic dataset
TABLE_2 = sorted(path.name for path in (BUNDLE / "configs").glob("table2_*.json"))


def from_root(*configs: str) -> tuple[str, ...]:
    return bundle_configs("residual_aligner", *configs)


def train(configs: tuple[str, ...], dataset: Path, output: Path, epochs: int, *more: object) -> str:
    options = "--dataset_dir", dataset, "--output_dir", output, "--max_epochs", epochs, "--epoch_length", 2
    return succeeded(command(*from_root(*configs), *options, "--spacing", COARSE, "--minimum", 0, *more))


def check_training(output: Path, epochs: int) -> dict[str, torch.Tensor]:
    """Check the files that a training leaves, and return the best weights."""
    assert [path.name for path in output.glob("models/checkpoint*")] == [f"checkpoint_epoch={epochs}.pt"]
    assert list(output.glob("tensorboard/events*")), "nothing for TensorBoard"
    best = json.loads((output / "models" / "model.json").read_text())
    assert 1 <= best["epoch"] <= epochs and 0 < best["mean_dice"] < 1
    state, shipped = (torch.load(path / "models" / "model.pt", weights_only=True) for path in (output, BUNDLE))
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in shipped.items()}
    assert all(torch.isfinite(value).all() for value in state.values())
    return state


def test_both_stages(dataset: Path, tmp_path: Path) -> None:
    """Stage 1 on known displacements, stage 2 from its weights, and stage 2 again from its own checkpoint."""
    first = train(("train.json", "pretrain.json"), dataset, tmp_path / "one", 1, "--rotation", 10, "--translation", 2)
    assert "epoch 1 of 1:" in first
    check_training(tmp_path / "one", 1)
    weights = "--weights", tmp_path / "one" / "models" / "model.pt"
    second = train(("train.json",), dataset, tmp_path / "two", 1, *weights)
    assert "going on from" not in second and "mean_dice" in second
    check_training(tmp_path / "two", 1)
    third = train(("train.json",), dataset, tmp_path / "two", 2, *weights)
    assert "checkpoint_epoch=1.pt" in third and "epoch 2 of 2:" in third and "epoch 1 of 2:" not in third
    check_training(tmp_path / "two", 2)


def test_table_2_has_seven_rows() -> None:
    assert len(TABLE_2) == 7
    rows = [json.loads((BUNDLE / "configs" / name).read_text()) for name in TABLE_2]
    assert all(key.startswith("network_def::") for row in rows for key in row)
    assert len({json.dumps(row) for row in rows}) == 7


@pytest.mark.parametrize("overlay", TABLE_2, ids=stem)
def test_table_2_trains(overlay: str) -> None:
    """Each overlay makes a network that takes a gradient, from train.json and from inference.json alike."""
    shapes = []
    for config in ("train.json", "inference.json"):
        parser = ConfigParser()
        parser.read_config([str(BUNDLE / "configs" / name) for name in (config, overlay)])
        parser["bundle_root"] = str(BUNDLE)
        net = parser.get_parsed_content("network_def")
        shapes.append({name: value.shape for name, value in net.state_dict().items()})
    assert shapes[0] == shapes[1]
    net(torch.rand(1, 2, 16, 16, 16)).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_inference_from_the_bundle_folder(raw: Path, tmp_path: Path) -> None:
    done = command(
        *("--config_file", "configs/inference.json"),
        *("--moving", raw / "moving.nii.gz", "--fixed", raw / "fixed.nii.gz"),
        *("--moving_label", raw / "moving_label.nii.gz", "--fixed_label", raw / "fixed_label.nii.gz"),
        *("--output_dir", tmp_path / "out", "--spacing", 4.0, "--save_inverse", True),
        cwd=BUNDLE,
    )
    assert "1 pair registered" in succeeded(done)
    (row,) = table(tmp_path / "out" / "results.csv")
    found = {path.name for path in (tmp_path / "out" / "moving_to_fixed").iterdir()}
    files = "warped.nii.gz transform.h5 displacement.nii.gz warped_label.nii.gz inverse_transform.h5"
    assert set(files.split()) <= found
    assert float(row["ncc_after"]) > float(row["ncc_before"]) > 0.2 and 0 < float(row["inverse_error_mm"]) < 1
    assert float(row["dice_after"]) > float(row["dice_before"])


def test_evaluation_of_a_dataset(dataset: Path, tmp_path: Path) -> None:
    options = "--dataset_dir", dataset, "--output_dir", tmp_path / "out", "--spacing", SPACING, "--minimum", 5
    text = succeeded(command(*from_root("inference.json", "evaluate.json"), *options))
    assert "2 pairs registered" in text and "mean HD95 in mm" in text
    rows = table(tmp_path / "out" / "results.csv")
    assert [row["id"] for row in rows] == ["p3_to_p4", "p4_to_p3"]
    for row in rows:
        assert float(row["dice_after"]) > float(row["dice_before"]) > 0.2
        assert 0 < float(row["hd95_after"]) < 60
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["motion_pairs.npy", "motion_pairs.png", "results.csv"], "an evaluation writes no volumes"
    assert "pairs of correct voxels" in text and np.load(tmp_path / "out" / "motion_pairs.npy").sum() > 1000


FAULTS = faults("RAN")


@pytest.mark.parametrize("options, sentence", FAULTS.values(), ids=FAULTS)
def test_bad_input_ends_in_one_sentence(raw: Path, tmp_path: Path, options: dict[str, str], sentence: str) -> None:
    check_refusal("residual_aligner", raw, tmp_path / "out", options, sentence)
