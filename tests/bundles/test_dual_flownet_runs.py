"""Dual-FlowNet through the commands that a user types: training with few labels, inference, evaluation, bad input."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import ROOT, SPACING, bundle_configs, centred, check_refusal, command, faults, succeeded, table, write
from monai.bundle import ConfigParser

from common import InputError
from common.run.data import stem

pytestmark = pytest.mark.slow

BUNDLE = ROOT / "bundles" / "dual_flownet"
COARSE = 9  # mm: 16x20x16 voxels of the synthetic dataset
TABLE_2 = {"dfn": "both+rcc", "gfn": "global", "grfn": "both", "rfn": "region"}
OVERLAYS = [f"table2_{name}.json" for name in TABLE_2] + ["wide.json", "union.json", "hippocampus.json"]


def from_root(*configs: str) -> tuple[str, ...]:
    return bundle_configs("dual_flownet", *configs)


def train(dataset: Path, output: Path, epochs: int, *more: object, configs=("train.json",), **options) -> str:
    given = "--dataset_dir", dataset, "--output_dir", output, "--max_epochs", epochs, "--epoch_length", 2
    given += "--spacing", COARSE, "--minimum", 0, "--val_interval", 1
    return succeeded(command(*from_root(*configs), *given, *more, **options))


def check_training(output: Path, epochs: int) -> dict[str, torch.Tensor]:
    """Check the files that a training leaves, and return the best weights."""
    assert [path.name for path in output.glob("models/checkpoint*")] == [f"checkpoint_epoch={epochs}.pt"]
    assert list(output.glob("tensorboard/events*")), "nothing for TensorBoard"
    best = json.loads((output / "models" / "model.json").read_text())
    assert 1 <= best["epoch"] <= epochs and 0.2 < best["mean_dice"] < 1
    state = torch.load(output / "models" / "model.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in state.values())
    return state


def shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


# ---- training -------------------------------------------------------------------------------------------------------


def test_training_starts_and_goes_on(dataset: Path, tmp_path: Path) -> None:
    """With the labels of two of the three scans: their map only teaches; the same command goes on from its end."""
    few = "--labelled", "['p0','p2']"
    first = train(dataset, tmp_path, 1, *few)
    assert "going on from" not in first and "mean_dice" in first and "used without labels" not in first
    shipped = torch.load(BUNDLE / "models" / "model.pt", weights_only=True)
    assert shapes(check_training(tmp_path, 1)) == shapes(shipped)
    second = train(dataset, tmp_path, 2, *few)
    assert "checkpoint_epoch=1.pt" in second and "epoch 2 of 2:" in second and "epoch 1 of 2:" not in second
    check_training(tmp_path, 2)


def test_gfn_trains_without_any_label(tmp_path: Path) -> None:
    """A plain folder of scans: an error that names the option, and with it a training."""
    (tmp_path / "scans").mkdir()
    for seed in range(2):
        write(tmp_path / "scans", f"p{seed}", (16, 20, 16), centred((16, 20, 16), np.diag([9.0, 9, 9])), seed)
        (tmp_path / "scans" / f"p{seed}_label.nii.gz").unlink()
    options = "--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / "out", "--max_epochs", 1
    options = *from_root("train.json", "table2_gfn.json"), *options, "--spacing", COARSE, "--epoch_length", 1
    done = command(*options)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "p0.nii.gz: has no label map; give --bad_labels unlabelled" in last
    text = succeeded(command(*options, "--bad_labels", "unlabelled", "--val_interval", 1))
    assert text.count("used without labels, it has no label map") == 2
    assert json.loads((tmp_path / "out" / "models" / "model.json").read_text()) == {"epoch": 1, "mean_dice": None}


def test_other_codes_are_refused(dataset: Path, tmp_path: Path) -> None:
    """Labels of 1 to 9 for a network that is told of the codes 1 to 8 only."""
    codes = "[[1,2],3,4,5,6,7,8]"
    done = command(
        *from_root("train.json"),
        *("--dataset_dir", dataset, "--output_dir", tmp_path, "--spacing", COARSE, "--network_def::classes", 7),
        *("--label_codes", codes),
    )
    assert done.returncode != 0
    sentence = "p0.nii.gz: has label codes that the config does not know (9); give --bad_labels unlabelled"
    assert sentence in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("options", ({"labelled": ["p0"]}, {"bad_labels": "unlabelled"}), ids=str)
def test_a_label_file_that_is_missing(options: dict, dataset: Path, tmp_path: Path) -> None:
    """It is no matter where it is not wanted or may be bad; otherwise one sentence names scan and file."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "train.json"))
    parser.update({"bundle_root": str(BUNDLE), "dataset_dir": str(dataset), "output_dir": str(tmp_path)})
    parser["spacing"] = COARSE
    strict = parser.get_parsed_content("train::preprocessing")
    parser.update(options)
    scans, preprocessing = (parser.get_parsed_content(f"train::{name}") for name in ("dataset::data", "preprocessing"))
    lost = next(scan for scan in scans if scan["id"] != "p0") | {"label": str(tmp_path / "lost.nii.gz")}
    found = preprocessing(lost)
    assert (found["label"] == -1).all() and found["label"].shape[1:] == found["image"].shape[1:]
    assert len(preprocessing(scans[0])["label"].unique()) > 1
    with pytest.raises(InputError, match=rf"{lost['id']}.nii.gz: has a label map that cannot be used .*lost.nii.gz"):
        strict(lost)


@pytest.mark.parametrize("fine", (True, False))
def test_fine_labels(fine: bool, dataset: Path, tmp_path: Path) -> None:
    """train.json gives the loss the single codes and what they belong to; the network keeps its classes."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "train.json"))
    given = {"bundle_root": str(BUNDLE), "dataset_dir": str(dataset), "output_dir": str(tmp_path), "spacing": COARSE}
    given |= {"label_codes": [[1, 2, 3], [4, 5, 6, 7, 8, 9]], "mirrored_classes": [], "network_def::classes": 2}
    parser.update(given | {"fine_labels": fine, "label_weight": 1.0, "rotation": 0})
    parser.update({"deformation": 0.5, "contrast_prob": 1.0})
    step, (pair, *_) = parser.get_parsed_content("train::network"), parser.get_parsed_content("train::dataset")
    assert set(pair["label"].unique().tolist()) == {-1, *range(10 if fine else 3)}, "-1 from outside the grid"
    loss = parser.get_parsed_content("loss")
    expected = [0, 1, 1, 1, 2, 2, 2, 2, 2, 2, -1]
    assert loss.class_of.tolist() == expected if fine else loss.class_of is None
    step(pair["image"][None].as_tensor(), pair["label"][None].as_tensor()).backward()
    assert parser.get_parsed_content("network_def").seg_cnn(torch.rand(1, 1, 16, 16, 16))[0].shape[1] == 3


def test_training_has_the_settings_of_the_paper() -> None:
    """Section 5.1.3: Adam at 1e-4, 20,000 iterations, mirroring, 25 degrees, the loss weights; labels of all scans."""
    config = json.loads((BUNDLE / "configs" / "train.json").read_text())
    assert config["max_epochs"] * config["epoch_length"] == 20_000 and config["batch_size"] == 1
    assert config["learning_rate"] == 1e-4 and config["lr_decay"] == 0
    assert config["optimizer"]["_target_"] == "torch.optim.Adam"
    assert config["mirror_prob"] == 0.5 and config["rotation"] == 25
    assert config["deformation"] == config["contrast_prob"] == 0
    assert [config[name] for name in ("alpha", "beta", "gamma", "eta")] == [1, 1, 1, 0.5]
    assert config["labelled"] is None and config["network_def"]["mode"] == "both+rcc"
    wide = json.loads((BUNDLE / "configs" / "wide.json").read_text())
    assert wide["network_def::widths"] == [16, 32, 64, 128, 256]


def test_table_2_has_four_rows() -> None:
    for name, mode in TABLE_2.items():
        overlay = json.loads((BUNDLE / "configs" / f"table2_{name}.json").read_text())
        assert overlay == {"network_def::mode": mode}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=stem)
def test_overlays_train(overlay: str) -> None:
    """Each makes a network whose parameters all take a gradient, from train.json and from inference.json alike."""
    found = []
    for config in ("train.json", "inference.json"):
        parser = ConfigParser()
        parser.read_config([str(BUNDLE / "configs" / name) for name in (config, overlay)])
        parser["bundle_root"] = str(BUNDLE)
        net = parser.get_parsed_content("network_def")
        found.append(shapes(net.state_dict()))
        if config == "train.json":
            loss = parser.get_parsed_content("loss")
            image, label = torch.rand(1, 2, 16, 16, 16), torch.randint(0, 3, (1, 2, 16, 16, 16)).float()
            loss(net.forward_train(image), image, label).backward()
            assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    assert found[0] == found[1]


# ---- inference and evaluation ---------------------------------------------------------------------------------------


def test_inference_from_the_bundle_folder(raw: Path, tmp_path: Path) -> None:
    """Both segmentations lie in the fixed scan's space; the refinement shows that the rest of the way is right."""
    done = command(
        *(
            "--config_file",
            "configs/inference.json",
            "--moving",
            raw / "moving.nii.gz",
            "--fixed",
            raw / "fixed.nii.gz",
        ),
        *("--moving_label", raw / "moving_label.nii.gz", "--fixed_label", raw / "fixed_label.nii.gz"),
        *("--output_dir", tmp_path / "out", "--spacing", 6.0, "--refine_steps", 20, "--save_inverse", True),
        cwd=BUNDLE,
    )
    assert "1 pair registered" in succeeded(done)
    (row,) = table(tmp_path / "out" / "results.csv")
    folder = tmp_path / "out" / "moving_to_fixed"
    files = "warped.nii.gz transform.h5 displacement.nii.gz warped_label.nii.gz inverse_transform.h5"
    files += " warped_segmentation.nii.gz fixed_segmentation.nii.gz report.json report.png report.html thumbnail.webp"
    assert set(files.split()) == {path.name for path in folder.iterdir()}
    assert float(row["dice_after"]) > float(row["dice_before"]) and 0 < float(row["inverse_error_mm"]) < 1
    fixed = nib.load(raw / "fixed.nii.gz")
    for name in ("warped", "fixed"):
        image = nib.load(folder / f"{name}_segmentation.nii.gz")
        assert image.shape == fixed.shape
        np.testing.assert_allclose(image.affine, fixed.affine, atol=1e-4)
        classes = np.unique(np.asarray(image.dataobj))
        assert set(classes.tolist()) <= set(range(28))


def test_global_mode_writes_no_segmentations(raw: Path, tmp_path: Path) -> None:
    options = "--moving", raw / "moving.nii.gz", "--fixed", raw / "fixed.nii.gz", "--spacing", 6.0, "--weights", ""
    overlays = from_root("inference.json", "table2_gfn.json")
    succeeded(command(*overlays, *options, "--prealign", "none", "--output_dir", tmp_path))
    found = {path.name for path in (tmp_path / "moving_to_fixed").iterdir()}
    reports = {"report.json", "report.png", "report.html", "thumbnail.webp"}
    assert found == {"warped.nii.gz", "transform.h5", "displacement.nii.gz"} | reports


def test_evaluation_of_a_dataset(dataset: Path, tmp_path: Path) -> None:
    options = "--dataset_dir", dataset, "--output_dir", tmp_path / "out", "--spacing", SPACING, "--minimum", 5
    text = succeeded(command(*from_root("inference.json", "evaluate.json"), *options))
    assert "2 pairs registered" in text and "mean HD95 in mm" in text
    rows = table(tmp_path / "out" / "results.csv")
    assert [row["id"] for row in rows] == ["p3_to_p4", "p4_to_p3"]
    for row in rows:
        assert 0.2 < float(row["dice_before"]) < 1 and 0.2 < float(row["dice_after"]) < 1
        assert 0 < float(row["hd95_after"]) < 40
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.csv"], "an evaluation writes no volumes"


FAULTS = faults("DualFlowNet")


@pytest.mark.parametrize("options, sentence", FAULTS.values(), ids=FAULTS)
def test_bad_input_ends_in_one_sentence(raw: Path, tmp_path: Path, options: dict[str, str], sentence: str) -> None:
    check_refusal("dual_flownet", raw, tmp_path / "out", options, sentence)
