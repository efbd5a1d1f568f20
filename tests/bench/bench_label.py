"""Label propagation through a real MONAI Label server against `monai.bundle run`: Dice, geometry, time.

python tests/bench/bench_label.py DATA FIXED [FIXED ...] --moving MOVING --output tests/bench/results/label.json

MOVING and FIXED are ids of dataset.json in the folder DATA. Needs MONAI Label (common/label/README.md); prints a row a
pair.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch
from monailabel.client import MONAILabelClient

from common.quality.metrics import label_overlap, mean_over_labels
from common.space import io

ROOT = Path(__file__).resolve().parents[2]


def studies(folder: Path, cases: dict[str, dict], data: Path, moving: str, fixed: list[str]) -> Path:
    """Copies of the scans, and the label of the moving one."""
    (folder / "labels" / "final").mkdir(parents=True)
    for name in (moving, *fixed):
        shutil.copy(data / cases[name]["image"], folder / f"{name}.nii.gz")
    shutil.copy(data / cases[moving]["label"], folder / "labels" / "final" / f"{moving}.nii.gz")
    return folder


def start(app: Path, images: Path) -> tuple[subprocess.Popen, str]:
    """A server on this machine only, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--app", str(app), "--studies", str(images), "--host", "127.0.0.1", "--port", str(port)]
    with (app.parent / "server.log").open("w") as log:
        line = [sys.executable, "-m", "monailabel.main", "start_server", *options]
        server = subprocess.Popen(line, stdout=log, stderr=log, cwd=app.parent)
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/info/", timeout=60).read()
            return server, f"http://127.0.0.1:{port}"
        except OSError:
            time.sleep(1)
    sys.exit((app.parent / "server.log").read_text()[-3000:])


def by_command(place: Path, images: Path, moving: str, fixed: list[str], bundle: str) -> Path:
    """The same pairs by `monai.bundle run`."""
    with (place / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "fixed", "moving", "moving_label"])
        label = images / "labels" / "final" / f"{moving}.nii.gz"
        rows.writerows([name, images / f"{name}.nii.gz", images / f"{moving}.nii.gz", label] for name in fixed)
    config = f"bundles/{bundle}/configs/inference.json"
    line = [sys.executable, "-m", "monai.bundle", "run", "--config_file", config, "--bundle_root", f"bundles/{bundle}"]
    line += ["--pairs", str(place / "pairs.csv"), "--output_dir", str(place / "out")]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
    return place / "out"


def dice(warped: np.ndarray, fixed: np.ndarray, moving: np.ndarray) -> float:
    found, target, source = (torch.from_numpy(x[0]).round().long() for x in (warped, fixed, moving))
    return mean_over_labels(label_overlap(target, found, source), "dice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("fixed", nargs="+")
    parser.add_argument("--moving", required=True)
    parser.add_argument("--bundle", default="sacb_net")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    content = json.loads((given.data / "dataset.json").read_text())
    cases = {case["id"]: case for part in ("training", "validation", "test") for case in content.get(part, [])}
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        images = studies(place / "studies", cases, given.data, given.moving, given.fixed)
        app, init = place / "app", [sys.executable, "-m", "common", "label", "init"]
        subprocess.run([*init, str(app), "--bundles", given.bundle], cwd=ROOT, check=True)
        server, address = start(app, images)
        client = MONAILabelClient(address, tmpdir=name)
        rows = []
        try:
            for fixed in given.fixed:
                began = time.time()
                file, result = client.infer(f"{given.bundle}_propagate", fixed, {"moving": given.moving})
                rows.append(
                    (fixed, *io.read_scan(shutil.move(file, place / f"{fixed}_got.nii.gz")), time.time() - began)
                )
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        out = by_command(place, images, given.moving, given.fixed, given.bundle)
        source = io.read_scan(given.data / cases[given.moving]["label"])[0]
        found = []
        for fixed, got, affine, seconds in rows:
            target = io.read_scan(given.data / cases[fixed]["label"])[0]
            other = io.read_scan(out / fixed / "warped_label.nii.gz")[0]
            row = {"moving": given.moving, "fixed": fixed, "dice_server": dice(got, target, source)}
            row |= {"dice_command": dice(other, target, source), "voxels_that_differ": int((got != other).sum())}
            like = io.read_scan(images / f"{fixed}.nii.gz")[1]
            row |= {"affine_as_the_scan": bool(np.allclose(affine, like, atol=1e-5)), "seconds": round(seconds, 1)}
            found.append(row)
            print(json.dumps(row), flush=True)
        if given.output:
            given.output.write_text(json.dumps({"bundle": given.bundle, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
