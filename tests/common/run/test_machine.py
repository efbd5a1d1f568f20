"""Memory and threads of a run, and that it loads no compiler."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import python

from common.run import machine

ROOT = Path(__file__).resolve().parents[3]
MEMORY = """if True:
    import ctypes, resource, torch
    from common.run import machine
    from common.run.forecast import resident_memory
    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    machine.keep_memory()
    faults()
    print(faults())
    kept, resident = machine.kept_memory(), resident_memory()
    ctypes.CDLL(None).malloc_trim(0)
    print(kept, resident - resident_memory())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keep_memory() does something with glibc only")
def test_kept_memory_is_not_fetched_again() -> None:
    """Pages that the system has to hand out for ten tensors of 64 MiB, one after the other: 16384 for each; next to
    none once the memory has settled. What is kept is said: so much less is left when it is given back to the system."""
    one = os.environ | {"OMP_NUM_THREADS": "1"}  # each thread may hold a top of the heap of its own
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, env=one, check=True, capture_output=True, text=True)
    fetched, kept, given_back = map(int, done.stdout.split())
    assert fetched < 1000 and given_back > 60 << 20
    assert abs(kept - given_back) < 66 << 20, "but for the top of the heap, whose pages were never fetched"


@pytest.mark.parametrize("load, threads", [(0.3, 4), (1.6, 2), (3.0, 1), (9.0, 1)])
def test_threads_are_those_of_idle_cores(monkeypatch: pytest.MonkeyPatch, load: float, threads: int) -> None:
    chosen = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    machine.take_threads()
    assert chosen == [threads]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    machine.take_threads()
    assert chosen == [threads], "who has set them has chosen"
    machine.take_threads(2)
    assert chosen == [threads, 2], "more so who has set --threads"


WATCHED = """if True:
    import runpy, sys
    sys.argv[0] = "monai.bundle"
    runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
    print([name for name in ("torch._dynamo", "torch._inductor", "triton") if name in sys.modules])
"""


@pytest.mark.slow
@pytest.mark.parametrize("bundle", sorted(path.name for path in (ROOT / "bundles").iterdir() if path.is_dir()))
def test_no_compiler_is_loaded(bundle: str, tmp_path: Path) -> None:
    """Network and refinement of the phantom; torch's compiler alone would take two CPU-seconds to load."""
    (tmp_path / "run.py").write_text(WATCHED)
    root = ROOT / "bundles" / bundle
    words = "run", "--config_file", root / "configs" / "inference.json", "--bundle_root", root
    words += "--output_dir", tmp_path / "out", "--spacing", 6, "--refine_steps", 2, "--report", "none"
    done = python(tmp_path / "run.py", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "[]"
    (report,) = (tmp_path / "out").glob("*/report.json")
    assert json.loads(report.read_text())["run"]["threads"] == 1
