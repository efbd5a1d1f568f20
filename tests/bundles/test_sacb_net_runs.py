"""SACB-Net through the commands that a user types: training, inference, evaluation, several processes, bad input."""

import json
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from commands import ROOT, SPACING, bundle_configs, centred, command, succeeded, table, write

from common import phantom

pytestmark = pytest.mark.slow

BUNDLE = ROOT / "bundles" / "sacb_net"
OUTPUTS = "warped.nii.gz transform.h5 displacement.nii.gz warped_label.nii.gz inverse_transform.h5"


def from_root(*configs: str) -> tuple[str, ...]:
    return bundle_configs("sacb_net", *configs)


# ---- training -------------------------------------------------------------------------------------------------------


def train(
    configs: tuple[str, ...],
    dataset: Path,
    output: Path,
    epochs: int,
    options: tuple[object, ...] = (),
) -> str:
    common = {
        "dataset_dir": dataset,
        "output_dir": output,
        "spacing": SPACING,
        "max_epochs": epochs,
        "epoch_length": 2,
        "minimum": 5,
    }
    pairs = [text for name, value in common.items() for text in (f"--{name}", value)]
    return succeeded(command(*from_root(*configs), *pairs, *options))


def check_training(output: Path, epochs: int) -> None:
    """Check the files that a training leaves."""
    assert [path.name for path in output.glob("models/checkpoint*")] == [f"checkpoint_epoch={epochs}.pt"]
    assert list(output.glob("tensorboard/events*")), "nothing for TensorBoard"
    best = json.loads((output / "models" / "model.json").read_text())
    assert 1 <= best["epoch"] <= epochs and 0.2 < best["mean_dice"] < 1
    state = torch.load(output / "models" / "model.pt", weights_only=True)
    shipped = torch.load(BUNDLE / "models" / "model.pt", weights_only=True)
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in shipped.items()}
    assert all(torch.isfinite(value).all() for value in state.values())


def test_training_starts_and_goes_on(dataset: Path, tmp_path: Path) -> None:
    first = train(("train.json",), dataset, tmp_path / "out", 2)
    assert "going on from" not in first and "epoch 2 of 2:" in first and "mean_dice" in first
    check_training(tmp_path / "out", 2)
    second = train(("train.json",), dataset, tmp_path / "out", 3)
    assert "going on from" in second and "checkpoint_epoch=2.pt" in second
    assert "epoch 3 of 3:" in second and "epoch 1 of 3:" not in second and "epoch 2 of 3:" not in second
    check_training(tmp_path / "out", 3)


def test_training_on_a_folder_of_scans(dataset: Path, tmp_path: Path) -> None:
    """No dataset.json, no labels, scans of their own grids: aligned to the first; the last weights are kept."""
    scans = tmp_path / "scans"
    scans.mkdir()
    for seed in range(3):
        turned = nib.eulerangles.euler2mat(0.1 * seed, 0, -0.1 * seed) @ np.diag([6.0, 5 + seed, 6])
        write(scans, f"p{seed}", (28, 32, 26), centred((28, 32, 26), turned), seed, phantom.Deformation(seed))
        (scans / f"p{seed}_label.nii.gz").unlink()
    options = (
        "--dataset_dir",
        scans,
        "--output_dir",
        tmp_path,
        "--spacing",
        6,
        "--prealign",
        "affine",
        "--max_epochs",
        1,
    )
    succeeded(command(*from_root("train.json"), *options, "--epoch_length", 1))
    assert json.loads((tmp_path / "models" / "model.json").read_text()) == {"epoch": 1, "mean_dice": None}
    assert [path.name for path in (tmp_path / "models").glob("checkpoint*")] == ["checkpoint_epoch=1.pt"]


def test_training_on_shapes(dataset: Path, tmp_path: Path) -> None:
    """Validated on the scans and on the scans turned over; the mean of the weights is validated, kept and gone on."""
    configs, options = ("train.json", "shapes.json"), ("--size", "[32,32,32]", "--val_interval", 1)
    first = train(configs, dataset, tmp_path / "out", 1, options=options)
    assert "epoch 1 of 1:" in first and "same_dice" in first and "turned_dice" in first
    assert "hippocampus_dice" not in first
    check_training(tmp_path / "out", 1)
    (saved,) = (tmp_path / "out" / "models").glob("checkpoint*")
    state, kept = torch.load(saved), torch.load(tmp_path / "out" / "models" / "model.pt")
    assert all(torch.equal(state["average"][name], value) for name, value in kept.items())
    assert not all(torch.equal(state["model"][name], value) for name, value in kept.items())
    second = train(configs, dataset, tmp_path / "out", 2, options=(*options, "--hippocampus_dir", dataset))
    assert "going on from" in second and "epoch 1 of 2:" not in second and "hippocampus_dice" in second
    check_training(tmp_path / "out", 2)


# ---- inference and evaluation ---------------------------------------------------------------------------------------


def test_inference_from_the_bundle_folder(raw: Path, tmp_path: Path) -> None:
    done = command(
        *("--config_file", "configs/inference.json", "--pairs", raw / "pairs.csv", "--output_dir", tmp_path / "out"),
        *("--spacing", 4.0, "--refine_steps", 10, "--save_inverse", True),
        cwd=BUNDLE,
        launcher="fresh",
    )
    assert "2 pairs registered" in succeeded(done)
    rows = table(tmp_path / "out" / "results.csv")
    assert [row["id"] for row in rows] == ["moving_to_fixed", "fixed_to_moving"]
    for row, fixed in zip(rows, ("fixed", "moving")):
        folder = tmp_path / "out" / row["id"]
        labelled = fixed == "fixed"
        expected = set(OUTPUTS.split()) - (set() if labelled else {"warped_label.nii.gz"})
        assert expected <= {path.name for path in folder.iterdir()}
        assert (folder / "warped_label.nii.gz").exists() == labelled
        own, given = (nib.load(path) for path in (folder / "warped.nii.gz", raw / f"{fixed}.nii.gz"))
        assert own.shape == given.shape
        np.testing.assert_allclose(own.affine, given.affine, atol=1e-4)
        assert float(row["ncc_after"]) > float(row["ncc_before"]) > 0.2 and float(row["inverse_error_mm"]) < 1
    assert float(rows[0]["dice_after"]) > float(rows[0]["dice_before"]) and rows[1]["dice_after"] == ""
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_evaluation_of_a_dataset(dataset: Path, tmp_path: Path) -> None:
    done = command(
        *from_root("inference.json", "evaluate.json"),
        *("--dataset_dir", dataset, "--output_dir", tmp_path / "out", "--spacing", SPACING, "--minimum", 5),
    )
    text = succeeded(done)
    assert "2 pairs registered" in text and "mean HD95 in mm" in text
    rows = table(tmp_path / "out" / "results.csv")
    assert [row["id"] for row in rows] == ["p3_to_p4", "p4_to_p3"]
    for row in rows:
        assert 0.2 < float(row["dice_before"]) < 1 and 0.2 < float(row["dice_after"]) < 1
        for name in ("hd95", "assd"):
            assert 0 < float(row[f"{name}_before"]) < 40 and 0 < float(row[f"{name}_after"]) < 40
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.csv"], "an evaluation writes no volumes"


# ---- bad input ------------------------------------------------------------------------------------------------------

FAULTS = {
    "missing file": ({"moving": "none.nii.gz", "fixed": "fixed.nii.gz"}, "none.nii.gz: no such file"),
    "constant scan": ({"moving": "constant.nii.gz", "fixed": "fixed.nii.gz"}, "constant.nii.gz: is constant"),
    "no image": ({"moving": "text.nii.gz", "fixed": "fixed.nii.gz"}, "text.nii.gz: not an image that can be read"),
    "not a number": ({"moving": "nan.nii.gz", "fixed": "fixed.nii.gz"}, "nan.nii.gz: holds NaN"),
    "channels": (
        {"moving": "colour.nrrd", "fixed": "colour.nrrd"},
        "colour.nrrd: has 3 channels, these weights take 1",
    ),
    "four axes": ({"moving": "film.nii.gz", "fixed": "fixed.nii.gz"}, "film.nii.gz: must be a 3-D scan"),
    "label of another shape": (
        {"moving": "plain.nii.gz", "fixed": "fixed.nii.gz", "moving_label": "smaller.nii.gz"},
        "smaller.nii.gz: the label map has shape",
    ),
    "label without whole numbers": (
        {"moving": "plain.nii.gz", "fixed": "fixed.nii.gz", "moving_label": "plain.nii.gz"},
        "plain.nii.gz: a label map has whole numbers",
    ),
    "far apart": (
        {"moving": "away.nii.gz", "fixed": "plain.nii.gz", "prealign": "none"},
        "away.nii.gz: does not overlap",
    ),
    "empty table": ({"pairs": "empty.csv"}, "empty.csv: holds no pairs"),
    "other weights": (
        {"moving": "moving.nii.gz", "fixed": "fixed.nii.gz", "weights": "other.pt"},
        "other.pt: these weights do not fit the network SACBNet",
    ),
}


@pytest.mark.parametrize("options, sentence", FAULTS.values(), ids=FAULTS)
def test_bad_input_ends_in_one_sentence(raw: Path, tmp_path: Path, options: dict[str, str], sentence: str) -> None:
    given = [t for name, file in options.items() for t in (f"--{name}", file if name == "prealign" else raw / file)]
    done = command(*from_root("inference.json"), *given, "--output_dir", tmp_path / "out", "--spacing", 4.0)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(f"error: {raw}/{sentence}"), done.stderr[-3000:]
    assert "Traceback" not in done.stderr and "registered" not in done.stdout
    left = [path.name for path in (tmp_path / "out").iterdir()] if (tmp_path / "out").exists() else []
    assert left == []


def test_results_that_cannot_be_written(raw: Path, tmp_path: Path) -> None:
    """Said before anything is computed."""
    (tmp_path / "file").write_text("kept")
    pair = "--moving", raw / "moving.nii.gz", "--fixed", raw / "fixed.nii.gz"
    done = command(*from_root("inference.json"), *pair, "--output_dir", tmp_path / "file")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    sentence = f"error: {tmp_path / 'file'}: results cannot be written there"
    assert done.stderr.splitlines()[-1].startswith(sentence), done.stderr[-3000:]
    assert (tmp_path / "file").read_text() == "kept"


# ---- real data ------------------------------------------------------------------------------------------------------


def test_raw_brains_in_one_command(development_data: Path, tmp_path: Path) -> None:
    """Two people as scanned, 1 mm, no preparation: labels overlap better, no folds, and ITK alone agrees."""
    folder = development_data / "data" / "dev" / "brain_t1"
    names = {"moving": "oasis_1107", "fixed": "oasis_1003"}
    files = {role: folder / "images" / f"{name}.nii.gz" for role, name in names.items()}
    files |= {f"{role}_label": folder / "labels" / f"{name}.nii.gz" for role, name in names.items()}
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        pytest.skip(f"development data not found: {', '.join(missing)}")
    given = [text for role, path in files.items() for text in (f"--{role}", path)]
    succeeded(command(*from_root("inference.json"), *given, "--output_dir", tmp_path))
    (row,) = table(tmp_path / "results.csv")
    assert row["id"] == "oasis_1107_to_oasis_1003"
    assert float(row["dice_after"]) > float(row["dice_before"])
    assert float(row["folding_pct"]) < 1 and float(row["ncc_after"]) > float(row["ncc_before"])

    moving, fixed = (itk.imread(str(files[role]), itk.F) for role in ("moving", "fixed"))
    (transform,) = itk.transformread(str(tmp_path / row["id"] / "transform.h5"))
    again = itk.resample_image_filter(moving, transform=transform, use_reference_image=True, reference_image=fixed)
    warped = itk.array_from_image(itk.imread(str(tmp_path / row["id"] / "warped.nii.gz"), itk.F))
    inside = itk.array_from_image(fixed) > 0
    assert np.abs(warped - itk.array_from_image(again))[inside].mean() < 0.01 * np.ptp(warped)
