"""A cohort with a network that does nothing: every pair once, whatever happens in between."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forks import PATIENCE
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose

from common import InputError
from common.run import cohort
from common.run.transforms import DeliverPaird
from common.space.files import HOST

SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from test_cohort import evaluator, pairs
from common.run.cohort import run
run(evaluator({out!r}, pairs({count}), work=lambda pair: time.sleep({seconds})))
"""


class Load:
    """Preprocessing with one setting; fails for pairs that say so."""

    def __init__(self, spacing: float = 2.0) -> None:
        self.spacing = spacing

    def __call__(self, pair: dict) -> dict:
        if "bad" in pair["moving"]:
            raise InputError(f"{pair['moving']}: not an image that can be read")
        if "bug" in pair["moving"]:
            raise ZeroDivisionError("division by zero\nsecond line")
        return pair | {"image": torch.zeros(2, 4, 4, 4)}


class Deliver:
    def __init__(self, out: str, work: Callable[[dict], object]) -> None:
        self.output_dir, self.work = out, work

    def __call__(self, data: dict) -> dict:
        self.work(data)
        with Path(self.output_dir, "log.txt").open("a") as file:
            file.write(f"{data['id']} {os.environ.get('RANK', 0)}\n")
        names = ("id", "fixed", "moving")
        row = {name: data[name] for name in names} | {"ncc_before": 0.5, "ncc_after": 0.75, "folding_pct": 0.25}
        return data | {"row": row | {"sdlogj": 0.1, "disp_mean_mm": 2.0, "seconds": 3.0, "warnings": ""}}


def pairs(count: int, *, bad: tuple[int, ...] = (), bug: tuple[int, ...] = ()) -> list[dict]:
    kinds = ["bad" if n in bad else "bug" if n in bug else "scan" for n in range(count)]
    return [{"id": f"100{n}", "fixed": "f.nii.gz", "moving": f"{kind}{n}.nii.gz"} for n, kind in enumerate(kinds)]


def evaluator(
    out: Path | str, rows: list[dict], *, spacing: float = 2.0, work: Callable[[dict], object] = id, resume: bool = True
) -> SupervisedEvaluator:
    Path(out).mkdir(exist_ok=True)
    load, net = Compose([Load(spacing)]), torch.nn.Conv3d(2, 3, 1)
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(rows, load), batch_size=1),
        network=net,
        prepare_batch=lambda batch, device, non_blocking, **kwargs: (batch["image"], None),
        postprocessing=Compose([Deliver(str(out), work)]),
        val_handlers=[cohort.PairTable(str(out), resume=resume, settings=[load])],
    )


def table(out: Path) -> list[dict]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def log(out: Path) -> list[str]:
    return [line.split()[0] for line in (out / "log.txt").read_text().splitlines()]


def test_a_row_a_pair_and_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    counts = []

    def count(data: dict) -> None:
        counts.append(len(table(tmp_path)) if (tmp_path / "results.csv").exists() else 0)

    engine = evaluator(tmp_path, pairs(3), work=count)
    cohort.run(engine)
    assert counts == [0, 1, 2], "the table must be written after every pair"
    assert [row["id"] for row in table(tmp_path)] == ["1000", "1001", "1002"] and len(engine.state.rows) == 3
    text = capsys.readouterr().out
    assert text.startswith(f"3 pairs registered, results in {tmp_path}\n")
    assert "correlation inside the fixed foreground: 0.500 after pre-alignment, 0.750 after registration" in text
    assert "folding: 0.250 %" in text and "3.0 s a pair" in text and "HD95" not in text
    assert "look at" not in text, "nothing was drawn"
    (tmp_path / "1000").mkdir()
    (tmp_path / "1000" / "report.html").touch()
    assert engine.state.table.summary().splitlines()[-1] == "  look at 1000/report.html"
    (tmp_path / "index.html").touch()
    assert engine.state.table.summary().splitlines()[-1] == "  look at index.html"


def test_a_failing_pair_does_not_stop_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its row has the reason; what is no fault of the input is shown in full; both are tried again the next time."""
    with pytest.raises(InputError, match=r"results.csv: 2 of 4 pairs failed, first 1001 \(bad1.nii.gz: not an image"):
        cohort.run(evaluator(tmp_path, pairs(4, bad=(1,), bug=(2,))))
    rows = table(tmp_path)
    assert [row["error"] for row in rows] == [
        "",
        "bad1.nii.gz: not an image that can be read",
        "ZeroDivisionError: division by zero",
        "",
    ]
    assert rows[1]["moving"] == "bad1.nii.gz" and rows[1]["ncc_after"] == ""
    shown = capsys.readouterr()
    assert "ZeroDivisionError" in shown.err and "Traceback" in shown.err and "2 pairs registered" in shown.out
    cohort.run(evaluator(tmp_path, pairs(4)))
    assert [row["error"] for row in table(tmp_path)] == [""] * 4
    assert log(tmp_path) == ["1000", "1003", "1001", "1002"], "only the failed ones are done again"


def test_a_single_pair_fails_as_an_error(tmp_path: Path) -> None:
    with pytest.raises(Exception) as caught:
        cohort.run(evaluator(tmp_path / "out", pairs(1, bad=(0,))))
    assert cohort.sentence_of(caught.value) == "bad0.nii.gz: not an image that can be read"
    assert not (tmp_path / "out").exists()


def test_what_is_done_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Unless the settings or the files of a pair are others, or it is asked for."""
    cohort.run(evaluator(tmp_path, pairs(3)))
    cohort.run(evaluator(tmp_path, pairs(5)))
    assert log(tmp_path) == ["1000", "1001", "1002", "1003", "1004"]
    assert "3 of 5 pairs were done before" in capsys.readouterr().out
    assert [float(row["ncc_after"]) for row in table(tmp_path)] == [0.75] * 5
    changed = pairs(5)
    changed[2]["fixed"] = "other.nii.gz"
    cohort.run(evaluator(tmp_path, changed))
    assert log(tmp_path)[5:] == ["1002"]
    cohort.run(evaluator(tmp_path, changed, spacing=1.0))
    assert len(log(tmp_path)) == 11
    cohort.run(evaluator(tmp_path, changed, spacing=1.0, resume=False))
    assert len(log(tmp_path)) == 16 and len(table(tmp_path)) == 5


def test_a_number_of_the_table_is_a_setting_of_its_pair(tmp_path: Path) -> None:
    first, changed = pairs(3), pairs(3)
    first[1]["guide"], changed[1]["guide"] = 0.1, 0.2
    cohort.run(evaluator(tmp_path, first))
    settings = [row["settings"] for row in table(tmp_path)]
    assert settings[0] == settings[2] != settings[1]
    cohort.run(evaluator(tmp_path, first))
    assert log(tmp_path) == ["1000", "1001", "1002"]
    cohort.run(evaluator(tmp_path, changed))
    assert log(tmp_path)[3:] == ["1001"] and table(tmp_path)[1]["settings"] != settings[1]


def chained(out: Path) -> list[dict]:
    """1003 starts from 1001, 1001 from 1004; 1000 and 1002 from nothing."""
    rows = pairs(5)
    rows[3]["start"], rows[1]["start"] = str(out / "1001" / "transform.h5"), str(out / "1004" / "transform.h5")
    return rows


def test_a_pair_that_starts_from_a_result_comes_after_it(tmp_path: Path) -> None:
    cohort.run(evaluator(tmp_path, chained(tmp_path)))
    assert log(tmp_path) == ["1000", "1004", "1001", "1003", "1002"]
    assert [row["id"] for row in table(tmp_path)] == ["1000", "1001", "1002", "1003", "1004"]
    cohort.run(evaluator(tmp_path, chained(tmp_path)))
    assert len(log(tmp_path)) == 5
    changed = chained(tmp_path)
    changed[4]["moving"] = "other.nii.gz"
    cohort.run(evaluator(tmp_path, changed))
    assert log(tmp_path)[5:] == ["1004", "1001", "1003"], "what starts from it is done again"
    cohort.run(evaluator(tmp_path, changed, resume=False))
    assert log(tmp_path)[8:] == ["1000", "1004", "1001", "1003", "1002"]


def test_pairs_that_wait_for_each_other(tmp_path: Path) -> None:
    rows = chained(tmp_path)
    rows[4]["start"] = str(tmp_path / "1003" / "transform.h5")
    with pytest.raises(InputError, match="^1001: starts from the result of 1004, and that in the end from 1001$"):
        cohort.run(evaluator(tmp_path, rows))
    rows[4]["start"] = str(tmp_path / "1004" / "transform.h5")  # its own, of an earlier run
    cohort.run(evaluator(tmp_path, rows))
    assert log(tmp_path) == ["1000", "1004", "1001", "1003", "1002"]


def test_a_chain_is_of_one_process(tmp_path: Path) -> None:
    """Two at work at once, on shares of their own or on what the other has not claimed."""
    first, second = (evaluator(tmp_path, chained(tmp_path)) for _ in range(2))
    numbers = [engine.state.table.begin(chained(tmp_path)) for engine in (first, second)]
    chains = first.state.table.chains(numbers[0])
    assert chains == [[0], [4, 1, 3], [2]] and second.state.table.chains([3, 2]) == [[3], [2]]
    mine = first.state.table.undone(chained(tmp_path), chains[1:])
    assert next(mine) == 4
    others = second.state.table.undone(chained(tmp_path), chains)
    assert [next(others), next(others)] == [0, 2]
    others.close()
    mine.close()


def test_what_a_killed_run_left_does_not_count(tmp_path: Path) -> None:
    """What it had in hand is free again; half-written files go."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = f".{HOST}-{ended.pid}-0.partial"
    (tmp_path / left).mkdir()
    (tmp_path / left / "warped.nii.gz").write_text("half")
    (tmp_path / f".{HOST}-{ended.pid}-1.csv").write_text("half")
    for number, job in enumerate((f".{HOST}-{ended.pid}-2.job", ".elsewhere-1-0.job")):
        (tmp_path / job).touch()
        (tmp_path / ".claims.json").write_text(json.dumps({f"100{number}": job}))
    cohort.run(evaluator(tmp_path, pairs(3)))
    assert [row["error"] for row in table(tmp_path)] == [""] * 3
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def start(out: Path, count: int, seconds: float, *launcher: str) -> subprocess.Popen:
    out.mkdir(exist_ok=True)
    script = out.parent / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), out=str(out), count=count, seconds=seconds))
    root = Path(__file__).resolve().parents[3]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *launcher, str(script)]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes_share_the_pairs(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    text = start(tmp_path / "out", 9, 0.05, *launcher).communicate(timeout=PATIENCE)[0]
    assert text.count("9 pairs registered") == 1, text
    lines = (tmp_path / "out" / "log.txt").read_text().split()
    assert sorted(lines[::2]) == [f"100{n}" for n in range(9)], "each pair once"
    assert {lines.count("0"), lines.count("1")} == {4, 5}
    assert [row["id"] for row in table(tmp_path / "out")] == [f"100{n}" for n in range(9)]
    assert not list((tmp_path / "out").glob(".rows.*"))


def test_the_page_is_turned_as_the_pairs_are(tmp_path: Path) -> None:
    """--neurological is said once, for the pages of the pairs and of the cohort."""
    (tmp_path / "results.csv").write_text("id,error\na,no such file\n")
    for neurological, body in ((True, '<body class="neurological">'), (False, "<body>")):
        deliver = DeliverPaird(str(tmp_path), neurological=neurological)
        cohort.PairTable(str(tmp_path), settings=[Compose([deliver])]).review()
        assert body in (tmp_path / "index.html").read_text(encoding="utf-8")
