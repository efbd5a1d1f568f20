"""Forty real pairs as one cohort, killed in the middle and started again, a corrupt file among them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, bundle_configs, table
from forks import PATIENCE

pytestmark = pytest.mark.slow

PAIRS = 40


def test_hippocampus_cohort_killed_and_resumed(development_data: Path, tmp_path: Path) -> None:
    """All rows once, none lost, none done twice but the one at work; the corrupt file gives a row with its reason."""
    folder = development_data / "data" / "dev" / "hippocampus_mr"
    if not (folder / "dataset.json").exists():
        pytest.skip(f"development data not found at {folder}")
    cases = json.loads((folder / "dataset.json").read_text())["training"][: PAIRS + 1]
    lines = ["fixed,moving,fixed_label,moving_label"]
    for moving, fixed in zip(cases[:PAIRS], cases[1:]):
        lines.append(",".join(str(folder / case[kind]) for kind in ("image", "label") for case in (fixed, moving)))
    (tmp_path / "corrupt.nii.gz").write_bytes((folder / cases[0]["image"]).read_bytes()[:2000])
    lines.insert(20, f"{folder / cases[0]['image']},corrupt.nii.gz,,")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    options = "--pairs", tmp_path / "pairs.csv", "--output_dir", out, "--prealign", "none"
    line = [
        sys.executable,
        "-m",
        "monai.bundle",
        "run",
        *bundle_configs("sacb_net", "inference.json", "hippocampus.json"),
    ]
    line += map(str, options)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    limit = time.time() + PATIENCE
    while (not (out / "results.csv").exists() or len(table(out / "results.csv")) < 12) and time.time() < limit:
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = table(out / "results.csv")
    stamps = {row["id"]: (out / row["id"] / "report.json").stat().st_mtime_ns for row in first}
    assert 12 <= len(first) < PAIRS

    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        f"error: {out / 'results.csv'}: 1 of {PAIRS + 1} pairs failed, first"
    )
    assert f"{len(first)} of {PAIRS + 1} pairs were done before" in done.stdout
    rows = table(out / "results.csv")
    assert len(rows) == PAIRS + 1 and len({row["id"] for row in rows}) == PAIRS + 1
    (failed,) = [row for row in rows if row["error"]]
    assert failed["moving"].endswith("corrupt.nii.gz") and "not an image that can be read" in failed["error"]
    assert rows[19] == failed, "rows come in the order of the pairs"
    for row in rows:
        if row is failed:
            assert not (out / row["id"]).exists()
            continue
        assert float(row["dice_after"]) > 0.3 and (out / row["id"] / "transform.h5").exists()
    for name, stamp in stamps.items():
        assert (out / name / "report.json").stat().st_mtime_ns == stamp, "a finished pair was done again"
    means = [sum(float(row[f"dice_{when}"]) for row in rows if not row["error"]) for when in ("before", "after")]
    assert means[1] > means[0]
    assert (out / "summary.png").stat().st_size > 10000
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []
