"""A cohort of pairs: each done once, failures set aside, a stopped run taken up again, several processes at work."""

import atexit
import csv
import datetime
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import ignite.distributed
import torch
from ignite.engine import Engine, EventEnum, Events
from monai.engines import Evaluator
from torch import nn
from torch.utils.data import DataLoader, Subset

from common import InputError
from common.quality import verdict
from common.quality.review import rows_of, write_review
from common.quality.summary import draw_summary
from common.run import progress
from common.run.claims import claimed, lineage
from common.run.cli import sentence_of
from common.run.data import NUMBERS
from common.run.processes import leave_group, processes, rank, wait
from common.space.files import locked, output_folder, remove_leftovers, replaced, write_table
from common.space.io import contrasts_of

TOLD = 5  # doubtful pairs of a cohort whose reasons are printed
IDENTITY = ("id", "fixed", "moving")  # columns that say which pair a row is of
UNTOLD = (
    "training",
    "output_dir",
    "weights",
    "memory",
    "cuda_graphs",
    "capturable",
)  # attributes that do not change a result, or are hashed by content


class CohortEvents(EventEnum):
    """Fired by `run` on its engine, for handlers that sum up over the pairs; a `PairTable` before them registers it."""

    ALL_PAIRS_COMPLETED = "all_pairs_completed"  # in every process, after the last pair of all of them


class PairTable:
    """results.csv: a row a pair, written after every pair, also of those that failed; and the summary at the end.

    Args:
        output_dir: where results.csv goes.
        name: word in front of the progress bar.
        resume: leave out pairs that are in results.csv already, made from the same files with the same settings.
        settings: the objects that a result depends on: transforms, network, inferer.
    """

    def __init__(
        self, output_dir: str, name: str = "register", *, resume: bool = True, settings: list[Any] | tuple = ()
    ) -> None:
        self.folder, self.name, self.resume = Path(output_dir), name, resume
        self.path, self.rows = self.folder / "results.csv", {}
        self.described = [described(item) for item in settings]
        self.settings = hashlib.sha256(json.dumps(self.described, default=str).encode()).hexdigest()[:12]
        steps = [step for item in settings for step in getattr(item, "transforms", ())]
        self.saves, self.neurological = (
            any(getattr(step, name, False) for step in steps) for name in ("save", "neurological")
        )

    def attach(self, engine: Engine) -> None:
        engine.state.table = self
        engine.register_events(*CohortEvents)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        # With a handler for it, ignite ends a run that failed in good order, and the next one can begin.
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._keep)

    def _collect(self, engine: Engine) -> None:
        for item in engine.state.output:
            self.add(item["row"] | {"error": ""})

    def _keep(self, engine: Engine, error: Exception) -> None:
        self.failure = error

    def add(self, row: dict) -> None:
        """Keep a row, and write the table."""
        row = row | {"settings": self.expected[row["id"]]["settings"]}
        self.rows[row["id"]] = row
        self.write()

    def write(self) -> list[dict]:
        """Put this process's rows into results.csv, beside those of the others; returns those of this cohort, in order.

        Rows of pairs that are not of it stay, if their files do: those of another job, or an earlier one.
        """
        with locked(self.path):
            found = {row["id"]: row for row in read_table(self.path)}
            own = [row for name in self.order if (row := self._newest(name, found.pop(name, None)))]
            kept = [row for row in found.values() if (self.folder / row["id"] / "report.json").exists()]
            write_table(self.path, [*kept, *own])
        return own

    def _newest(self, name: str, found: dict | None) -> dict | None:
        """The row of a pair: this process's own, or that of another one, which may have done what failed here."""
        own = self.rows.get(name)
        if not self._is_of(found):
            return own
        return found if own is None or (own.get("error") and not found.get("error")) else own

    def _is_of(self, row: dict | None) -> bool:
        """Whether a row is of a pair of this cohort, its files and settings."""
        return bool(row) and all(str(row.get(name)) == text for name, text in self.expected[row["id"]].items())

    def begin(self, pairs: list[dict]) -> list[int]:
        """Numbers of the pairs that are still to be done; those done before keep their rows."""
        self.order = [pair["id"] for pair in pairs]
        self.expected = {
            pair["id"]: {name: str(pair.get(name)) for name in IDENTITY} | {"settings": self._settings_of(pair)}
            for pair in pairs
        }
        self.rows, self.before = {}, {}
        self.lineage = lineage(pairs, self.folder)
        if not self.resume or len(pairs) < 2:
            return list(range(len(pairs)))
        self.before = found = {row["id"]: row for row in read_table(self.path)}
        by_id = {pair["id"]: pair for pair in pairs}
        for name in sorted(by_id, key=lambda name: len(self.lineage[name])):
            row, stands = found.get(name), all(before in self.rows for before in self.lineage[name])
            if stands and self._is_of(row) and not row.get("error") and self._stands(by_id[name]):
                self.rows[name] = row
        return [n for n, name in enumerate(self.order) if name not in self.rows]

    def _settings_of(self, pair: dict) -> str:
        """The settings of all pairs, and what the table says of this one's own."""
        own = {name: pair[name] for name in (*NUMBERS, "start") if name in pair}
        return hashlib.sha256(f"{self.settings}{own}".encode()).hexdigest()[:12] if own else self.settings

    def chains(self, numbers: list[int]) -> list[list[int]]:
        """The numbers of the pairs that start from each other's results together, in the order in which to do them."""
        found: dict[str, list[int]] = {}
        for number in sorted(numbers, key=lambda number: len(self.lineage[self.order[number]])):
            found.setdefault(self._first(number), []).append(number)
        return [found[name] for name in dict.fromkeys(map(self._first, numbers))]

    def _first(self, number: int) -> str:
        name = self.order[number]
        return (*self.lineage[name], name)[0]

    def undone(self, pairs: list[dict], chains: list[list[int]]) -> Iterator[int]:
        """Numbers of those pairs that no other process does at the same time, or has done since `begin`."""
        if not self.resume or len(pairs) < 2:
            yield from (number for chain in chains for number in chain)
            return
        with closing(claimed(self.folder, [self._first(chain[0]) for chain in chains])) as places:
            for number in (number for place in places for number in chains[place]):
                if self._done_since(pairs[number]):
                    progress.advance()
                else:
                    yield number

    def _done_since(self, pair: dict) -> bool:
        """Whether another process has done a pair after this one began; a failure counts unless it is to be retried."""
        row = next((row for row in read_table(self.path) if row["id"] == pair["id"]), None)
        if not self._is_of(row) or str(row) == str(self.before.get(pair["id"])):
            return False
        return bool(row.get("error")) or self._stands(pair)

    def _stands(self, pair: dict) -> bool:
        """Whether the pair's folder is there, if there should be one, and not older than its files."""
        written = self.folder / pair["id"] / "report.json"
        if not self.saves:
            return True
        files = [part for name, value in pair.items() if name not in ("id", *NUMBERS) for part in contrasts_of(value)]
        return written.exists() and all(
            os.path.exists(file) and os.path.getmtime(file) <= written.stat().st_mtime for file in files
        )

    def finish(self) -> list[dict]:
        """The last table, summary.png of a cohort whose files are kept, and the summary in words."""
        rows = self.write()
        self.rows = {row["id"]: row for row in rows}
        if self.saves and len(rows) > 1:
            replaced(self.folder / "summary.png", lambda path: draw_summary(rows, path))
            if any((self.folder / row["id"] / "report.html").is_file() for row in rows):
                self.review()
        progress.tell(self.summary())
        return rows

    def review(self) -> None:
        """index.html of all pairs in the table."""
        rows = read_table(self.path)
        sides = {"neurological": self.neurological}
        replaced(self.folder / "index.html", lambda path: write_review(self.folder, rows, path, **sides))

    def summary(self) -> str:
        """What the results say, a line a measure, and where they are."""
        rows = [row for row in self.rows.values() if not row.get("error")]
        lines = [f"{len(rows)} pair{'s' * (len(rows) != 1)} registered, results in {self.folder.absolute()}"]
        folders = [row["id"] for row in rows if (self.folder / row["id"]).is_dir()]
        where = f"; its files are in {folders[0]}" if folders else ""
        if len(folders) > 1:
            where = f"; the files of a pair are in a folder of its name, as {folders[0]}"
        lines.append(f"  {self.path.name}: a row a pair{where}")
        lines += self._verdicts(rows)
        words = {
            "ssim": "structural similarity",
            "ncc": "correlation inside the fixed foreground",
            "dice": "mean Dice of the labels",
            "dice_coarse": "mean Dice of the label groups",
            "hd95": "mean HD95 in mm",
            "assd": "mean ASSD in mm",
            "tre_mm": "mean distance of the landmarks in mm",
        }
        for name, text in words.items():
            before, after = (_mean(rows, f"{name}_{when}") for when in ("before", "after"))
            if after == after:
                lines.append(f"  {text}: {before:.3f} after pre-alignment, {after:.3f} after registration")
        folding = f"{_mean(rows, 'folding_pct'):.3f} % of the fixed foreground"
        lines.append(f"  folding: {folding}, SDlogJ {_mean(rows, 'sdlogj'):.3f}")
        lines.append(
            f"  displacement: mean {_mean(rows, 'disp_mean_mm'):.1f} mm; {_mean(rows, 'seconds'):.1f} s a pair"
        )
        pages = [f"{name}/report.{kind}" for name in folders[:1] for kind in ("html", "png")]
        pages = ["index.html"] * (len(rows) > 1) + pages
        page = next((page for page in pages if (self.folder / page).is_file()), "")
        return "\n".join([*lines, f"  look at {page}"] if page else lines)

    def _verdicts(self, rows: list[dict]) -> list[str]:
        """The verdict of a pair with its reasons, or how many got which, and the most suspicious of them."""
        reasons = {row["id"]: verdict.parted(row.get("warnings") or "") for row in rows}
        doubtful = sorted((name for name in reasons if reasons[name]), key=lambda name: -len(reasons[name]))
        if len(reasons) == 1:
            (found,) = reasons.values()
            return [f"  verdict: {verdict.verdict_of(found).upper()}", *(f"    - {reason}" for reason in found)]
        counts = {"plausible": len(rows) - len(doubtful), "doubtful": len(doubtful)}
        counts["failed"] = len(self.rows) - len(rows)
        lines = [f"  verdicts: {', '.join(f'{count} {word}' for word, count in counts.items())}"]
        lines += [f"    - {name}: {'; '.join(reasons[name])}" for name in doubtful[:TOLD]]
        return lines + ([f"    - and {len(doubtful) - TOLD} more"] if len(doubtful) > TOLD else [])

    def told(self, name: str) -> str:
        """A pair's verdict and its first reason, or why it failed, in a line."""
        row = self.rows[name]
        if row.get("error"):
            return f"{name}: failed: {row['error']}"
        reasons = verdict.parted(row.get("warnings") or "")
        return f"{name}: {verdict.verdict_of(reasons)}" + (f": {reasons[0]}" if reasons else "")


def run(engine: Evaluator) -> None:
    """Run an evaluator over the pairs of its data, one by one; its own log is kept quiet.

    A pair that fails gets a row with its reason and the next one begins. Under torchrun each process takes its share of
    the pairs, and process 0 sums up. Runs of the same command that were started at once share the pairs as well: what
    one has in hand or has done the others leave out. A single pair fails as an error.

    Raises:
        InputError: at the end, if any pair of a cohort failed.
    """
    engine.logger.disabled = True
    table, loader = engine.state.table, engine.data_loader
    if processes() > 1 and not torch.distributed.is_initialized():
        # For waiting at the end only, however long the longest share takes.
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        atexit.register(leave_group)
        ignite.distributed.sync()
    pairs = loader.dataset.data
    todo = table.begin(pairs)
    output_folder(table.folder)
    wait()  # nobody writes before all have read what is done
    if not rank():
        remove_leftovers(table.folder)
    wait()
    if len(todo) < len(pairs) and not rank():
        progress.tell(f"{len(pairs) - len(todo)} of {len(pairs)} pairs were done before, with these settings")
    share = table.chains(todo)[rank() :: processes()]
    progress.start(sum(map(len, share)), table.name if processes() == 1 else f"{table.name} (process {rank()})")
    for n in (undone := table.undone(pairs, share)):
        engine.data_loader = DataLoader(Subset(loader.dataset, [n]), batch_size=1, collate_fn=loader.collate_fn)
        engine.state.epoch_length = 1
        progress.take()
        progress.put(device=str(engine.state.device), threads=torch.get_num_threads(), settings=table.described)
        table.failure = None
        engine.run()
        if table.failure is not None:
            if len(pairs) == 1 or not isinstance(table.failure, Exception):
                progress.close()
                undone.close()
                if not any(table.folder.iterdir()):
                    table.folder.rmdir()
                raise table.failure
            table.add(_failed(pairs[n], table.failure))
        progress.advance(table.told(pairs[n]["id"]))
    engine.data_loader = loader
    progress.close()
    wait()
    engine.fire_event(CohortEvents.ALL_PAIRS_COMPLETED)
    if rank():
        return
    engine.state.rows = rows = table.finish()
    remove_leftovers(table.folder)  # of runs beside this one that were killed meanwhile
    if failed := [row for row in rows if row["error"]]:
        count = f"{len(failed)} of {len(rows)} pairs failed, first {failed[0]['id']}"
        raise InputError(f"{table.path}: {count} ({failed[0]['error']}); run the same command again to retry them")


def review_folder(folder: Path, *, neurological: bool = False) -> tuple[Path, int]:
    """Make index.html of a folder of results anew, from results.csv and the pairs' folders; returns it and the count.

    Args:
        neurological: show the patient's left on the left.

    Raises:
        InputError: no folder, or no pair in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    table = {row["id"]: row for row in read_table(folder / "results.csv")}
    rows = list(({row["id"]: row for row in rows_of(folder)} | table).values())
    if not rows:
        raise InputError(f"{folder}: holds no results.csv and no pair's report.json")
    path = folder / "index.html"
    replaced(path, lambda partial: write_review(folder, rows, partial, neurological=neurological))
    return path, len(rows)


def _failed(pair: dict, error: Exception) -> dict:
    """The row of a pair that failed. What is no fault of the input is shown in full as well."""
    sentence = sentence_of(error)
    if sentence is None:
        traceback.print_exception(error, file=sys.stderr)
        while error.__cause__ is not None:  # MONAI wraps what a transform raises
            error = error.__cause__
        sentence = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return {name: pair.get(name, "") for name in ("id", "fixed", "moving")} | {"error": sentence}


def described(item: object) -> object:
    """What an object was made with, as plain values: to compare two runs, and for the report."""
    if isinstance(item, nn.Module):
        parts = {name: _plain_attributes(module) for name, module in item.named_modules()}
        digest = hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()[:12]
        return {"network": type(item).__name__, "structure": digest, **getattr(item, "weights", {"sha256": None})}
    if hasattr(item, "transforms"):
        return [described(step) for step in item.transforms]
    return {type(item).__name__: _plain_attributes(item)}


def _plain_attributes(item: object) -> dict:
    return {
        name: value
        for name, value in vars(item).items()
        if not name.startswith("_") and name not in UNTOLD and _is_plain(value)
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (int, float, str, type(None)))


def read_table(path: Path) -> list[dict]:
    """Rows of results.csv with numbers as numbers; [] if there is none or it is none of ours."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    words = (*IDENTITY, "settings", "warnings", "error")
    return [
        {name: text if name in words else _value(text) for name, text in row.items()}
        for row in rows
        if row.get("id")
    ]


def _value(text: str) -> float | int | str:
    """A cell as the number that it is; an empty one stays empty."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _mean(rows: list[dict], name: str) -> float:
    values = torch.tensor([row[name] for row in rows if isinstance(row.get(name), (int, float))], dtype=torch.float64)
    return float(values.nanmean()) if len(values) else float("nan")
