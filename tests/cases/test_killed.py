"""Runs that are killed, and runs that share a folder."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_is_done_twice(repository) -> None:
    """A cohort and a training, killed at random moments; tests/bench/bench_killed.py checks them, here with few."""
    line = [sys.executable, "tests/bench/bench_killed.py", "--times", "2", "--cases", "3", "--report", "none"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
    done = subprocess.run(line, cwd=repository, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cohort"]["kills"] == 2 and found["shared"]["kills"] == 1
    assert found["training"]["kills while writing"] == 2
