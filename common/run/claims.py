"""Which pair is whose, where several processes work on one cohort in one folder; and which pair waits for which."""

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from common import InputError
from common.space.files import beside, locked, replaced


def lineage(pairs: list[dict], folder: Path) -> dict[str, list[str]]:
    """Of each pair, those whose results it starts from, one from the other's, the first one first.

    Raises:
        InputError: pairs that wait for each other.
    """
    places = {str(folder.absolute() / pair["id"]): pair["id"] for pair in pairs}
    before = {pair["id"]: places.get(str(Path(pair.get("start", "")).parent)) for pair in pairs}
    found = {}
    for name in before:
        line = [name]
        while (earlier := before[line[-1]]) is not None and earlier != line[-1]:
            if earlier in line:
                ring = f"starts from the result of {before[earlier]}, and that in the end from {earlier}"
                raise InputError(f"{earlier}: {ring}")
            line.append(earlier)
        found[name] = line[:0:-1]
    return found


def claimed(folder: Path, names: list[str]) -> Iterator[int]:
    """Number of each name, one by one, while no other process has it in hand; what another one has comes later."""
    claims, waiting, refused = _Claims(folder), deque(range(len(names))), 0
    try:
        while waiting:
            number = waiting.popleft()
            if claims.take(names[number]):
                refused = 0
                try:
                    yield number
                finally:
                    claims.release(names[number])
                continue
            waiting.append(number)
            refused += 1
            if refused >= len(waiting):  # others have all that is left: one of them may be killed yet
                time.sleep(0.2)
    finally:
        claims.close()


class _Claims:
    """What processes have in hand; what a process had that has ended, in whatever way, is free again.

    Each process holds a lock of the system on a file of its own, which ends with it. .claims.json says which name is
    whose file's.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.mine = folder / ".claims.json", beside(folder / "claims", ".job")
        self.lock = FileLock(self.mine)
        self.lock.acquire()

    def take(self, name: str) -> bool:
        """Claim a name; False if another process has it in hand."""
        os.utime(self.mine)  # a young file is no leftover
        with locked(self.path):
            held = {other: job for other, job in self._read().items() if self._lives(job)}
            free = held.setdefault(name, self.mine.name) == self.mine.name
            self._write(held)
        return free

    def release(self, name: str) -> None:
        with locked(self.path):
            self._write({other: job for other, job in self._read().items() if other != name})

    def close(self) -> None:
        self.mine.unlink(missing_ok=True)
        self.lock.release()

    def _lives(self, job: str) -> bool:
        path = self.path.with_name(job)
        if path == self.mine or not path.exists():
            return path == self.mine
        try:
            with FileLock(path, timeout=0):
                path.unlink(missing_ok=True)  # no other process gets this name
            return False
        except Timeout:
            return True

    def _read(self) -> dict[str, str]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def _write(self, held: dict[str, str]) -> None:
        if held:
            replaced(self.path, lambda partial: partial.write_text(json.dumps(held), encoding="utf-8"))
        else:
            self.path.unlink(missing_ok=True)
