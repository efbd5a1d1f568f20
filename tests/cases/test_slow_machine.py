"""tests/bench/slowly.py is a slower machine; and no test waits for anything for fewer seconds than such a one takes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
BUSY = """
import subprocess, sys, time
if len(sys.argv) == 1:
    sys.exit(subprocess.run([sys.executable, __file__, "child"]).returncode)
begin, cpu = time.monotonic(), time.process_time()
while time.process_time() - cpu < 0.3:
    pass
print((time.process_time() - cpu) / (time.monotonic() - begin))
sys.exit(7)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="children are read from /proc")
def test_a_process_and_its_child_get_a_fifth(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(BUSY)
    line = [sys.executable, str(TESTS / "bench" / "slowly.py"), "5", sys.executable, str(tmp_path / "busy.py")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert float(done.stdout) < 0.35


def test_no_test_has_a_time_of_its_own() -> None:
    """Waits end after `forks.PATIENCE`, or never: a number of seconds in a test is what a slow machine fails by."""
    found = []
    for path in sorted(TESTS.rglob("test_*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"timeout=\d|\.wait\(\d|(time|monotonic)\(\) \+ \d|communicate\(\d|alarm\([1-9]", line):
                found.append(f"{path.name}:{number}: {line.strip()}")
    assert not [line for line in found if not line.startswith(Path(__file__).name)], found
