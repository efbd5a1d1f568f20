"""Run a command on a machine that is slower than this one: all its processes stand still for most of the time.

    python tests/bench/slowly.py 5 COMMAND ...        # five times slower: it runs for 20 ms of every 100

What the tests do on such a machine, as `python tests/bench/slowly.py 5 python -m pytest -n 0 tests/bundles`. Processes
that the command starts are found among the children of its processes. Exit code of the command. For Linux.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PERIOD = 0.1  # s


def family(process: int) -> list[int]:
    """A process, its children, theirs, and so on."""
    found = [process]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, task.read_text().split())
    return found


def send(number: int, processes: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def main(factor: float, command: list[str]) -> int:
    started = subprocess.Popen(command)
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return started.wait(PERIOD / factor)
            stopped = family(started.pid)
            send(signal.SIGSTOP, stopped)
            time.sleep(PERIOD * (1 - 1 / factor))
            send(signal.SIGCONT, stopped)
    finally:
        if started.poll() is None:
            send(signal.SIGTERM, family(started.pid))


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
