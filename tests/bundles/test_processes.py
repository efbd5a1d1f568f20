"""Several processes: the numbers of one process, a rank that is killed, an evaluation that is shared."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, SPACING, TORCHRUN, bundle_configs, command, succeeded, table
from forks import PATIENCE

pytestmark = pytest.mark.slow
MULTI = ("train.json", "multi_gpu_train.json")


@pytest.fixture
def two_scans(dataset: Path, tmp_path: Path) -> Path:
    """The dataset with two training scans: two ordered pairs, which are one batch of two, or one pair for each rank."""
    folder = tmp_path / "two"
    shutil.copytree(dataset, folder)
    content = json.loads((folder / "dataset.json").read_text())
    content["training"] = content["training"][:2]
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


STILL = "--mirror_prob", 0, "--rotation", 0  # random augmentation differs between ranks, as it should
TRAINED = {"sacb_net": (), "residual_aligner": (), "dual_flownet": STILL}


@pytest.mark.parametrize("name, more", TRAINED.items(), ids=TRAINED)
def test_two_ranks_train_as_one_process(name: str, more: tuple, two_scans: Path, tmp_path: Path) -> None:
    """Two steps on the same pairs from the same weights: the movement of the weights agrees to 0.1 % of its size.

    By gradient descent in steps that are short against the bends of the loss: Adam divides by the gradient's size,
    which makes rounding as large as the gradient itself where that is nearly zero, and from the end of a long step the
    second one starts elsewhere. SAMConvex trains on random crops of its own; test_samconvex_runs has its two ranks.
    """
    start = ROOT / "bundles" / name / "models" / "model.pt"
    options = *more, "--dataset_dir", two_scans, "--spacing", 9, "--minimum", 0, "--weights", start
    options += "--max_epochs", 2, "--epoch_length", 1, "--val_interval", 2
    options += "--learning_rate", 0.0001, "--optimizer#_target_", "torch.optim.SGD"
    one = "--batch_size", 2, "--output_dir", tmp_path / "one"
    succeeded(command(*bundle_configs(name, "train.json"), *options, *one))
    two = "--batch_size", 1, "--output_dir", tmp_path / "two_ranks"
    text = succeeded(command(*bundle_configs(name, *MULTI), *options, *two, launcher="ranks"))
    assert text.count("epoch 2 of 2:") == 1, "one process writes the log"
    first = torch.load(start, weights_only=True)
    found = [weights_after(tmp_path / folder) for folder in ("one", "two_ranks")]
    moved, apart = (
        sum(float((a[key] - b[key]).double().square().sum()) for key in first if first[key].is_floating_point()) ** 0.5
        for a, b in ((found[0], first), (found[1], found[0]))
    )
    assert moved > 1e-5
    assert apart <= 1e-3 * moved, (apart, moved)
    best = torch.load(tmp_path / "two_ranks" / "models" / "model.pt", weights_only=True)
    assert {k: v.shape for k, v in best.items()} == {k: v.shape for k, v in first.items()}, "those of the plain network"


def weights_after(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "models" / "checkpoint_epoch=2.pt", weights_only=False)["model"]


def test_training_goes_on_after_a_rank_was_killed(dataset: Path, tmp_path: Path) -> None:
    """torchrun, gloo and --device cpu: it stops the other rank and fails; the same command goes on from the last whole
    epoch."""
    output = tmp_path / "out"
    options = "--dataset_dir", dataset, "--output_dir", output, "--spacing", 9, "--minimum", 0, "--epoch_length", 1
    options += "--device", "cpu"
    words = [*bundle_configs("sacb_net", *MULTI), *map(str, options), "--max_epochs"]
    line = [sys.executable, *TORCHRUN, "-m", "monai.bundle", "run", *words, "500"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = (tmp_path / "log.txt").open("w+")
    process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=log, stderr=log)
    limit = time.time() + PATIENCE
    while not list(output.glob("models/checkpoint_epoch=*.pt")):
        assert process.poll() is None and time.time() < limit, (tmp_path / "log.txt").read_text()[-3000:]
        time.sleep(0.1)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    assert process.wait(timeout=PATIENCE) != 0
    assert not any(Path(f"/proc/{rank}/cmdline").exists() for rank in ranks), "a rank is left behind"
    epoch, checkpoint = max((int(p.stem.partition("=")[2]), p) for p in output.glob("models/checkpoint_epoch=*.pt"))
    text = succeeded(command(*words, epoch + 1, launcher="torchrun"))
    assert f"going on from {checkpoint}" in text and f"epoch {epoch + 1} of {epoch + 1}:" in text
    left = sorted(path.name for path in (output / "models").iterdir())
    assert left == sorted([f"checkpoint_epoch={epoch + 1}.pt", "model.json", "model.pt"])


def test_two_processes_evaluate_as_one(dataset: Path, tmp_path: Path) -> None:
    """Each takes half of the pairs, and one of them writes the table and the plot, which are those of one process."""
    options = "--dataset_dir", dataset, "--spacing", SPACING, "--minimum", 5
    configs = bundle_configs("residual_aligner", "inference.json", "evaluate.json")
    text = succeeded(command(*configs, *options, "--output_dir", tmp_path / "two", launcher="ranks"))
    assert text.count("2 pairs registered") == 1
    succeeded(command(*configs, *options, "--output_dir", tmp_path / "one"))
    one, two = (table(tmp_path / folder / "results.csv") for folder in ("one", "two"))
    assert [row["id"] for row in two] == ["p3_to_p4", "p4_to_p3"]
    for row in one + two:
        row.pop("seconds")
    assert one == two
    counts = [np.load(tmp_path / folder / "motion_pairs.npy") for folder in ("one", "two")]
    np.testing.assert_array_equal(*counts)
    assert counts[0].sum() > 1000 and (tmp_path / "two" / "motion_pairs.png").exists()
