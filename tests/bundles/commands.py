"""What the tests of the bundles' commands share: run a command, read its table, write synthetic scans."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from forks import python, ranks

from common import phantom
from common.space import io

ROOT = Path(__file__).resolve().parents[2]
SPACING = 4.5  # mm, of the synthetic dataset
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def command(*arguments: object, launcher: str = "fork", cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """`python -m monai.bundle run ARGUMENTS`, one thread. Outside the root `common` is importable as if installed.

    Args:
        launcher: "fork", "ranks" (two of them), both of `forks`; "fresh" is a process from its very start, "torchrun"
            two of them.
    """
    line = ["-m", "monai.bundle", "run", *map(str, arguments)]
    if launcher in ("fork", "ranks"):
        return {"fork": python, "ranks": ranks}[launcher](*line, cwd=cwd)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    if cwd != ROOT:
        environment["PYTHONPATH"] = str(ROOT)
    line = [sys.executable, *(TORCHRUN if launcher == "torchrun" else ()), *line]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400)


def bundle_configs(name: str, *configs: str) -> tuple[str, ...]:
    """Options that name configs of a bundle, from the repository's root."""
    files = [f"bundles/{name}/configs/{config}" for config in configs]
    return "--config_file", str(files) if len(files) > 1 else files[0], "--bundle_root", f"bundles/{name}"


def succeeded(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def table(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(folder: Path, name: str, size: tuple[int, int, int], affine: np.ndarray, seed: int, person=None) -> None:
    image, label = phantom.sample(size, affine, person, seed=seed)
    io.write_scan(image, affine, folder / f"{name}.nii.gz")
    io.write_label(label, affine, folder / f"{name}_label.nii.gz")


def centred(size: tuple[int, int, int], linear: np.ndarray) -> np.ndarray:
    return nib.affines.from_matvec(linear, -linear @ ((np.array(size) - 1) / 2))


def faults(network: str) -> dict[str, tuple[dict[str, str], str]]:
    """Bad input of one pair out of the folder `raw`: options, and the sentence after that folder's name."""
    good = {"moving": "moving.nii.gz", "fixed": "fixed.nii.gz"}
    return {
        "missing file": (good | {"moving": "none.nii.gz"}, "none.nii.gz: no such file"),
        "channels": (dict.fromkeys(good, "colour.nrrd"), "colour.nrrd: has 3 channels, these weights take 1"),
        "other weights": (good | {"weights": "other.pt"}, f"other.pt: these weights do not fit the network {network}"),
    }


def check_refusal(name: str, raw: Path, output: Path, options: dict[str, str], sentence: str) -> None:
    """The inference of a bundle ends in that one sentence."""
    given = [text for option, file in options.items() for text in (f"--{option}", raw / file)]
    done = command(*bundle_configs(name, "inference.json"), *given, "--output_dir", output, "--spacing", 4.0)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(f"error: {raw}/{sentence}"), done.stderr[-3000:]
    assert "Traceback" not in done.stderr and "registered" not in done.stdout
