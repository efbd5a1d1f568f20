"""Runs that are killed at random moments and started again, and runs that share a folder: nothing lost, nothing twice.

    python tests/bench/bench_killed.py [--times 20] [--seed 0] [--output tests/bench/results/killed.json]

Every run is a process of its own, forked from this one, which has loaded what all of them need, and ends by SIGKILL
unless it may finish. The results are compared with those of a run that nobody disturbed.
"""

import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
import torch
from machine import ROOT, hardware

sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # before the forks: a pool of threads does not survive one

from monai.bundle import ConfigWorkflow  # noqa: E402

from common import phantom  # noqa: E402
from common.run import cohort  # noqa: E402
from common.run.registrar import Registrar  # noqa: E402
from common.space import io  # noqa: E402

BUNDLE = ROOT / "bundles" / "sacb_net"
SIZE, AFFINE = (22, 26, 22), nib.affines.from_matvec(np.diag([8.0, 8, 8]), [-84.0, -100, -84])
TIMES = ("seconds",)  # columns that differ from run to run
EPOCHS = 3


def scans(folder: Path, count: int) -> list[str]:
    """Small scans in images, their label maps in labels; returns their names."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for n in range(count):
        image, label = phantom.sample(SIZE, AFFINE, None, seed=n)
        io.write_scan(image, AFFINE, folder / "images" / f"p{n}.nii.gz")
        io.write_label(label, AFFINE, folder / "labels" / f"p{n}.nii.gz")
    return [f"p{n}.nii.gz" for n in range(count)]


def process(work: Callable[[], None], log: Path) -> int:
    """Number of a new process that does `work`."""
    if child := os.fork():
        return child
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def ended(child: int, log: Path) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, log.read_text()[-3000:]


def killed(child: int) -> bool:
    """Kill a process; False if it was done before."""
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*"))


# ---- a cohort -------------------------------------------------------------------------------------------------------


class Cohort:
    """Pairs of small scans, and the rows and files that an undisturbed run gives."""

    def __init__(self, folder: Path, count: int, report: str) -> None:
        self.folder, names = folder, scans(folder / "scans", count)
        pairs = [(a, b) for a in names for b in names if a != b]
        self.pairs = folder / "scans" / "images" / "pairs.csv"
        self.pairs.write_text("\n".join(["moving,fixed", *map(",".join, pairs)]) + "\n")
        self.registrar = Registrar(BUNDLE, device="cpu", spacing=8.0, prealign="none", report=report)
        self.registrar.register(*(self.pairs.with_name(name) for name in names[:2]))  # so that all is loaded
        begin = time.time()
        ended(self.start(folder / "whole"), folder / "whole.log")
        self.seconds = (time.time() - begin) / len(pairs)
        self.rows = rows_of(folder / "whole")
        assert len(self.rows) == len(pairs)
        self.files = {path.name for path in (folder / "whole" / next(iter(self.rows))).iterdir()}

    def start(self, out: Path) -> int:
        """A process that registers the cohort into a folder; every row that it makes is a line of OUT.done."""

        def work() -> None:
            done, add = out.with_suffix(".done"), cohort.PairTable.add

            def told(table: cohort.PairTable, row: dict) -> None:
                with done.open("a") as file:
                    file.write(f"{row['id']}\n")
                add(table, row)

            cohort.PairTable.add = told
            self.registrar.run(pairs=str(self.pairs), output_dir=str(out))

        return process(work, out.with_suffix(".log"))

    def check(self, out: Path) -> dict[str, dict]:
        """The rows of a folder where a run was killed: each once, whole, and as undisturbed, with all of its files."""
        found = rows_of(out)
        for name, row in found.items():
            assert row == self.rows[name], (row, self.rows[name])
            assert {path.name for path in (out / name).iterdir()} == self.files
            assert np.asarray(nib.load(out / name / "warped.nii.gz").dataobj).shape == SIZE
            json.loads((out / name / "report.json").read_text())
        return found

    def check_whole(self, out: Path) -> list[str]:
        """All rows in order, nothing left behind; returns the pairs in the order in which they were done."""
        assert list(self.check(out)) == list(self.rows)
        assert hidden(out) == [], hidden(out)
        return out.with_suffix(".done").read_text().split()


def rows_of(out: Path) -> dict[str, dict]:
    if not (out / "results.csv").exists():
        return {}
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {row["id"]: {name: value for name, value in row.items() if name not in TIMES} for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    assert all(set(row) == set(rows[0]) and None not in row.values() for row in rows), "a row is cut off"
    return found


def cohort_killed(pairs: Cohort, times: int, drawn: random.Random) -> dict:
    """One run after the other is killed, some moment within three pairs' time after the last; a new cohort begins
    where one is whole before that.
    """
    out, before, hits = pairs.folder / "killed", {}, 0
    while hits < times:
        child = pairs.start(out)
        time.sleep(drawn.uniform(0, 3 * pairs.seconds))
        if not killed(child):  # it was done: anew
            pairs.check_whole(out)
            out.rename(out.with_name(f"full{hits}"))
            before = {}
            continue
        hits += 1
        found = pairs.check(out)
        assert before.items() <= found.items(), "a row is lost"
        before = found
    ended(pairs.start(out), out.with_suffix(".log"))
    done = pairs.check_whole(out)
    return {"kills": hits, "pairs": len(pairs.rows), "rows made, also by those killed": len(done)}


def cohort_shared(pairs: Cohort, times: int, drawn: random.Random) -> dict:
    """Two runs started at once do each pair once; and where one of them is killed, the other does what is left."""
    out, undone = pairs.folder / "shared", 0
    for child in [pairs.start(out), pairs.start(out)]:
        ended(child, out.with_suffix(".log"))
    assert sorted(pairs.check_whole(out)) == sorted(pairs.rows), "each pair once"
    for n in range(times):
        out = pairs.folder / f"shared{n}"
        first, second = pairs.start(out), pairs.start(out)
        time.sleep(drawn.uniform(0, 3 * pairs.seconds))
        killed(first)
        ended(second, out.with_suffix(".log"))
        done = pairs.check_whole(out)
        assert len(done) <= len(pairs.rows) + 1, "at most the pair that the killed one had in hand is done again"
        undone += len(done) - len(pairs.rows)
    return {"runs of two": 1 + times, "kills": times, "pairs": len(pairs.rows), "done again": undone}


# ---- a training -----------------------------------------------------------------------------------------------------


def training(out: Path, data: Path, cut: int | None = None) -> int:
    """A process that trains; with `cut` it is killed once it has written so many bytes of its files of weights."""

    def work() -> None:
        if cut is not None:
            save, left = torch.save, [cut]

            class Dying:
                def __init__(self, path: Path) -> None:
                    self.file = open(path, "wb", buffering=0)

                def write(self, content: bytes) -> int:
                    part = bytes(content)[: left[0]]
                    left[0] -= self.file.write(part)
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return len(part)

                def flush(self) -> None:
                    pass

            torch.save = lambda content, path: save(content, Dying(path))
        options = {"dataset_dir": str(data), "output_dir": str(out), "spacing": 12.0, "minimum": 0, "device": "cpu"}
        options |= {"max_epochs": EPOCHS, "epoch_length": 2, "flip_prob": 0.5, "deformation": 1.0}
        workflow = ConfigWorkflow(
            str(BUNDLE / "configs" / "train.json"), logging_file=False, workflow_type="train", bundle_root=str(BUNDLE)
        )
        workflow.given_options = {"bundle_root": str(BUNDLE)} | options
        workflow.initialize()
        workflow.run()

    return process(work, out.with_suffix(".log"))


def training_killed(folder: Path, times: int, drawn: random.Random) -> dict:
    """Killed while it writes a checkpoint, after any number of bytes, and at any other moment; then to the end."""
    scans(folder / "data", 4)
    begin = time.time()
    ended(training(folder / "whole", folder / "data"), folder / "whole.log")
    seconds, expected = time.time() - begin, state_of(folder / "whole")
    weights = (folder / "whole" / "models" / f"checkpoint_epoch={EPOCHS}.pt").stat().st_size
    writing = other = resumed = 0
    while writing < times or other < times // 4:
        out = folder / f"killed{writing + other}"
        while True:  # until one is done before its end comes
            cut = drawn.randrange(1, EPOCHS * weights) if writing < times else None
            child = training(out, folder / "data", cut)
            if cut is None:
                time.sleep(drawn.uniform(0, seconds))
                hit = killed(child)
                other += hit
            else:
                hit = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
                writing += hit
            if not hit or (writing >= times and other >= times // 4):
                break
        ended(training(out, folder / "data"), out.with_suffix(".log"))
        resumed += out.with_suffix(".log").read_text().count("going on from")
        found = state_of(out)
        for name, value in expected.items():
            assert same(found[name], value), name
        assert hidden(out) == [], hidden(out)
    return {"kills while writing": writing, "at another moment": other, "gone on from a checkpoint": resumed}


def state_of(out: Path) -> dict:
    """What a training ends with: weights, optimizer, rate, and the best of the validation."""
    models = out / "models"
    names = sorted(path.name for path in models.iterdir())
    assert names == [f"checkpoint_epoch={EPOCHS}.pt", "model.json", "model.pt"], names
    state = torch.load(models / names[0], weights_only=True)
    state |= {"best": torch.load(models / "model.pt", weights_only=True)}
    return state | {"note": json.loads((models / "model.json").read_text())}


def same(a: object, b: object) -> bool:
    """Whether two states are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main(times: int = 20, seed: int = 0, cases: int = 6, report: str = "png", output: str = "") -> None:
    """Kill `times` times a cohort of cases (cases - 1) pairs, with this --report, and a training while it writes."""
    with tempfile.TemporaryDirectory() as place:
        folder, drawn = Path(place), random.Random(seed)
        pairs = Cohort(folder, cases, report)
        found = {"cohort": cohort_killed(pairs, times, drawn)}
        print(json.dumps(found), flush=True)
        found["shared"] = cohort_shared(pairs, -(-times // 4), drawn)
        print(json.dumps(found), flush=True)
        found["training"] = training_killed(folder / "training", times, drawn)
    print(json.dumps(found), flush=True)
    if output:
        Path(output).write_text(json.dumps({"hardware": hardware(), "seed": seed} | found, indent=1) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
