"""`python -m common template SCANS OUT`: a template of mean shape and mean intensity from the scans of many people.

Round 0 is the mean of the affinely aligned scans. In each further round every scan is registered to the template so
far, the mean m of these maps T_i is inverted, and the scans are averaged by T_i m^-1 (`space.average.mean_map`).
OUT/rounds/N holds a round: ID.h5 for each scan as soon as it is registered, template.nii.gz when the round is done. So
a run that was stopped goes on where it was.
"""

import hashlib
import json
import os
import shlex
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import common
from common import InputError, RegistrationWarning
from common.quality.metrics import label_overlap, mean_over_labels
from common.quality.picture import draw_volumes
from common.run.choose import choose, facts_of
from common.run.cli import bundle_folder, config_file, refuse_unknown, sentence_of
from common.run.options import OF_ALL, TEMPLATE, TEMPLATE_DEFAULTS
from common.run.people import Person, people_of
from common.run.registrar import Registrar
from common.run.values import check
from common.space import average, geometry, io, mapping
from common.space.prealign import prealign
from common.space.transform_files import read_transform, write_transform

MEASURES = ("ncc_after", "structure_after", "disp_mean_mm", "folding_pct", "sdlogj", "warnings")  # of a row, kept


def make_template(scans: str | os.PathLike, output_dir: str | os.PathLike, **options: Any) -> Path:
    """Build a template; what `python -m common template` does, with its options by their names.

    Args:
        scans: folder of scans, or a pairs CSV without the fixed scan: columns moving, id, moving_label, moving_mask.
        output_dir: OUT. template.nii.gz is the sharpened mean (`average.Blend.sharpened`), mean.nii.gz the plain one,
            spread.nii.gz the standard deviation, template_label.nii.gz the vote of the label maps, OUT/ID/transform.h5
            takes a point of the template to its place in a scan, so it brings the scan onto the template.
        options: of `options.TEMPLATE` and `options.OF_ALL`.

    Returns:
        OUT.

    Raises:
        InputError: fewer than two scans, channels that differ, what the readers and a registration refuse.
    """
    for name in options:
        refuse_unknown(name, name, {*TEMPLATE, *OF_ALL})
    own = TEMPLATE_DEFAULTS | {n: check(n, TEMPLATE[n], value) for n, value in options.items() if n in TEMPLATE}
    registering = {name: value for name, value in options.items() if name in OF_ALL}
    reading = {name: registering.get(name) or "" for name in ("header", "series")}
    out = Path(os.path.abspath(output_dir))
    if out == Path(os.path.abspath(scans)):
        raise InputError(f"{out}: holds the scans; the template needs a folder of its own")
    people = people_of(os.path.abspath(scans), own["labels"], **reading)
    registrar, told = _registrar(own, registering, people, reading)
    reference = os.path.abspath(own["reference"]) if own["reference"] else people[0].scan
    out = io.output_folder(out)
    building = _Building(out, people, registrar, reference, own["voxel_size"], reading)
    building.begin(own["resume"])
    if building.is_done(own["rounds"]):
        print("nothing is left to do", flush=True)
        return out
    try:
        for number in range(own["rounds"] + 1):
            building.go_through(number, own["rounds"])
        building.finish(own["rounds"], told)
    except Exception as error:
        if (sentence := sentence_of(error)) is None or isinstance(error, InputError):
            raise
        raise InputError(sentence) from error
    return out


def _registrar(own: dict, registering: dict, people: list[Person], reading: dict) -> tuple[Registrar, dict]:
    """What registers, and what is told about it: asked for by name, or chosen by the first two scans."""
    settings, config, reason = {}, own["config"], "asked for by name"
    if own["method"] == "auto":
        labels = tuple(person.label for person in people[:2] if person.label)
        mode = registering.get("prealign", "affine")
        facts = facts_of(people[1].scan, people[0].scan, labels, mode=mode, **reading)
        choice = choose(facts)
        own = own | {"method": choice.bundle}
        settings, config, reason = choice.options, config or choice.config, choice.reason
    root = bundle_folder(own["method"])
    config = config_file(config, root) if config else ""
    options = settings | registering
    shown = shlex.join([root.name, *(f"--{n}={v}" for n, v in options.items()), *([Path(config).name] * bool(config))])
    print(f"method: {shown} ({reason})", flush=True)
    registrar = Registrar(root, config=config, **options, surface=False)
    return registrar, {"bundle": root.name, "config": Path(config).name, "options": options, "reason": reason}


class _Building:
    """The rounds of one template and their files."""

    def __init__(
        self,
        out: Path,
        people: list[Person],
        registrar: Registrar,
        reference: str,
        voxel_size: float | None,
        reading: dict,
    ) -> None:
        self.out, self.people, self.registrar, self.reading = out, people, registrar, reading
        self.reference = reference
        self.stripped = all(person.stripped for person in people)
        finest = [np.linalg.norm(person.grid[1][:3, :3], axis=0).min() for person in people]
        self.voxel_size = voxel_size or float(np.median(finest).round(4))

    @property
    def settings(self) -> dict:
        """What the rounds depend on; with other settings they begin anew."""
        files = [self.reference, *(f for p in self.people for f in (p.scan, *p.beside.values()))]
        parts = [part for file in files for part in io.contrasts_of(file)]
        weights = [*sorted(self.registrar.root.glob("models/*.pt")), self.registrar.options.get("weights") or ""]
        configs = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in self.registrar.files]
        content = {
            "version": common.__version__,
            "scans": [[person.id, Path(person.scan).name] for person in self.people],
            "files": [_stamp(file) for file in [*parts, *weights]],
            "configs": configs,
            "options": {n: v for n, v in self.registrar.options.items() if n not in ("device", "memory")},
            "voxel_size": self.voxel_size,
        }
        return json.loads(json.dumps(content, default=str))

    def begin(self, resume: bool) -> None:
        """Keep the rounds that are there, if they were made with these settings; else begin anew."""
        io.remove_leftovers(self.out)
        path, rounds = self.out / "rounds" / "settings.json", self.out / "rounds"
        kept = resume and path.is_file() and json.loads(path.read_text(encoding="utf-8")) == self.settings
        if rounds.is_dir() and not kept:
            if resume:
                print(f"{rounds}: made from other scans or with other settings, begins anew", flush=True)
            shutil.rmtree(rounds)
            (self.out / "template.json").unlink(missing_ok=True)
        rounds.mkdir(exist_ok=True)
        io.replaced(path, partial(_write_json, self.settings))

    def is_done(self, rounds: int) -> bool:
        """Whether the files in OUT are those of so many rounds, and of these label maps."""
        path = self.out / "template.json"
        if not path.is_file():
            return False
        told = json.loads(path.read_text(encoding="utf-8"))
        return len(told["rounds"]) == rounds + 1 and told["labels"] == self._label_stamps()

    def _label_stamps(self) -> list:
        return [_stamp(person.label) for person in self.people]

    def folder(self, number: int) -> Path:
        return self.out / "rounds" / str(number)

    def go_through(self, number: int, rounds: int) -> None:
        """One round, or what is missing of it."""
        if (self.folder(number) / "template.nii.gz").is_file():
            return
        self.folder(number).mkdir(exist_ok=True)
        io.remove_leftovers(self.folder(number))
        self.register(number, f"round {number} of {rounds}" if number else "affine alignment")
        facts = self.average(number)
        words = f"round {number} of {rounds}" if number else "affine mean"
        moved = f"the mean shape moved by {facts['shape_mm']:.2f} mm, " if number else ""
        sharp = f"slope of the mean {facts['slope']:.4f}, of the template {facts['slope_sharpened']:.4f}"
        print(f"{words}: {moved}{sharp}, of the scans {facts['slope_scans']:.4f} a voxel", flush=True)
        if number:
            for person in self.people:
                self.place(number - 1, person).unlink(missing_ok=True)

    def place(self, number: int, person: Person) -> Path:
        """Of the map from the template of the round before to a person."""
        return self.folder(number) / f"{person.id}.h5"

    def register(self, number: int, name: str) -> None:
        """Every scan that has no map yet to the template of the round before; in round 0 to the reference, linearly."""
        left = [person for person in self.people if not self.place(number, person).is_file()]
        for person in tqdm(left, desc=name, unit="scan", file=sys.stderr, disable=None):
            if number:
                target = self.folder(number - 1) / "template.nii.gz"
                found = self.registrar.register(person.scan, target, **person.beside)
                row = {name: found.row[name] for name in MEASURES if name in found.row}
                io.replaced(self.place(number, person).with_suffix(".json"), partial(_write_json, row))
                the_map = average.faded(found.transform)
            else:
                the_map = mapping.affine_transform(self._aligned(person))
            write_transform(the_map, self.place(number, person))

    def _aligned(self, person: Person) -> np.ndarray:
        mode = self.registrar.options.get("prealign", self.registrar.defaults.get("prealign", "affine"))
        if person.scan == self.reference or mode == "none":
            return np.eye(4)
        fixed, fixed_affine = self._read(self.reference)
        moving, moving_affine = self._read(person.scan)
        return prealign(fixed[0], fixed_affine, moving[0], moving_affine, mode)

    def _read(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        with warnings.catch_warnings():  # said when it was looked at
            warnings.simplefilter("ignore", RegistrationWarning)
            return io.read_scan(path, **self.reading)

    def grid(self) -> mapping.Grid:
        """Of all templates."""
        array, affine = io.read_scan(self.folder(0) / "template.nii.gz")
        return array.shape[1:], affine

    def map_of(self, number: int, person: Person) -> mapping.Transform:
        """From the template that a round has made to a person: m^-1, then T_i."""
        back = read_transform(self.folder(number) / "shape.h5")
        return mapping.compose(back, read_transform(self.place(number, person)))

    def average(self, number: int) -> dict:
        """The template of a round from its maps; template.nii.gz is written last."""
        places = [self.place(number, person) for person in self.people]
        maps = (read_transform(place) for place in places)  # one at a time: each is as large as a scan
        if number:
            grid = self.grid()
            field = next(part for part in read_transform(places[0]).parts if isinstance(part, mapping.Field))
            spacing = max(self.voxel_size, float(np.linalg.norm(field.affine_ras[:3, :3], axis=0).min().round(4)))
            mean = average.mean_map(maps, geometry.working_grid(*grid, spacing))
        else:
            array, affine = self._read(self.reference)
            reference = array.shape[1:], affine
            mean = average.mean_map(maps, reference)
        write_transform(mapping.invert(mean), self.folder(number) / "shape.h5")
        if not number:
            fovs = [(person.grid, mapping.matrix_of(self.map_of(0, person))) for person in self.people]
            grid = average.mean_grid(reference, fovs, self.voxel_size)
        blend = average.Blend()
        for person in self.people:
            blend.add(*self.warped(person, self.map_of(number, person), grid))
        sharp = blend.sharpened()
        slopes = [average.steepness(x)[blend.inside].mean() for x in (blend.mean[0], sharp[0])]
        moved = np.linalg.norm(mapping.displacement_mm(mean, *grid), axis=0)[blend.inside].mean()
        facts = {"shape_mm": moved, "slope": slopes[0], "slope_sharpened": slopes[1], "slope_scans": blend.steepness}
        facts = {name: float(value) for name, value in facts.items()}
        sharp = np.where(blend.inside, sharp, 0) if self.stripped else sharp
        volumes = {"mean": blend.mean, "spread": blend.spread, "template": sharp.astype(np.float32)}
        io.replaced(self.folder(number) / "round.json", partial(_write_json, facts))
        for name, array in volumes.items():
            io.replaced(self.folder(number) / f"{name}.nii.gz", partial(io.write_scan, array, grid[1]))
        return facts

    def warped(self, person: Person, the_map: mapping.Transform, grid: mapping.Grid) -> tuple[np.ndarray, np.ndarray]:
        """A scan on the grid of the template, scaled, NaN where it does not reach; and where it shows something."""
        array, affine = self._read(person.scan)
        keeps = self.registrar.options.get("intensity_range") is not None
        channels = []
        for channel, (low, high) in zip(array, person.ranges):
            outside = 0.0 if person.stripped else np.nan
            values = mapping.resample(channel, affine, *grid, the_map, outside=outside)
            channels.append(values if keeps else (values - low) / max(high - low, 1e-12))
        floor = person.ranges[0][0] if keeps else 0.0
        return np.stack(channels), channels[0] > floor

    def finish(self, number: int, told: dict) -> None:
        """The results in OUT: maps, votes, table and picture; template.json is the last."""
        self.register(number, "what is missing")
        (size, affine), last = self.grid(), self.folder(number)
        rows, labels = [], {}
        for person in self.people:
            the_map = self.map_of(number, person)
            row = {"id": person.id, "scan": person.scan}
            if person.label:
                codes, own = io.read_label(person.label, header=self.reading["header"])
                labels[person.id] = mapping.resample(codes[0], own, size, affine, the_map, voted=True)
            if (path := self.place(number, person).with_suffix(".json")).is_file():
                row |= json.loads(path.read_text(encoding="utf-8"))
            rows.append(row)
            io.write_folder(self.out / person.id, {"transform.h5": partial(write_transform, the_map)})
        if labels:
            fused = average.vote(np.stack(list(labels.values())))
            io.replaced(self.out / "template_label.nii.gz", partial(io.write_label, fused, affine))
            for row in rows:
                if row["id"] in labels:
                    scores = label_overlap(*(torch.from_numpy(x).long() for x in (fused, labels[row["id"]])))
                    row["dice_with_vote"] = round(mean_over_labels(scores, "dice"), 5)
        for name in ("mean", "spread", "template"):
            io.replaced(self.out / f"{name}.nii.gz", partial(shutil.copyfile, last / f"{name}.nii.gz"))
        io.write_table(self.out / "results.csv", rows)
        volumes = {"affine mean": self.folder(0) / "mean.nii.gz", "mean": last / "mean.nii.gz"}
        volumes |= {"template": last / "template.nii.gz", "spread": last / "spread.nii.gz"}
        arrays = {name: io.read_scan(path)[0][0] for name, path in volumes.items()}
        caption = f"{len(self.people)} scans, {number} round{'s' * (number != 1)}; spread: standard deviation."
        io.replaced(self.out / "template.png", lambda path: draw_volumes(arrays, affine, path, caption))
        rounds = [json.loads((self.folder(n) / "round.json").read_text(encoding="utf-8")) for n in range(number + 1)]
        content = {"method": told, "scans": len(self.people), "rounds": rounds, "labels": self._label_stamps()}
        io.replaced(self.out / "template.json", partial(_write_json, content))
        for person in self.people:
            self.place(number, person).unlink(missing_ok=True)
        if doubtful := [row["id"] for row in rows if row.get("warnings")]:
            print(f"{len(doubtful)} of {len(rows)} scans have warnings in results.csv, first {doubtful[0]}", flush=True)


def _stamp(file: str | os.PathLike) -> list:
    """Name, size and time of a file that results depend on."""
    if not str(file) or not os.path.exists(file):
        return [str(file)]
    stat = os.stat(file)
    return [Path(file).name, stat.st_size, stat.st_mtime_ns]


def _write_json(content: object, path: Path) -> None:
    path.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
