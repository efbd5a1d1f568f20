"""Bad inputs and options, drawn with a seed, through every command: each has to end in one sentence and exit code 1,
or, where it can be used after all, with a warning that fits. No traceback, nothing silent, nothing half-written.

    python tests/bench/bad_inputs.py [--count 400] [--seed 0] [--only WORD] [--json FILE] [--rows FILE --minutes 1]

With --rows, a file of a line a case, what it holds is not done again; --minutes ends a part (exit code 75).
"""

import argparse
import collections
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import faults
import numpy as np
from machine import ROOT, hardware
from outcomes import GIB, GOOD, RAN, SECONDS, Outcome, bundle, called, common, judged

from common.run.options import FOR_INFERENCE, FOR_TRAINING, OWN, Option

RESULTS = Path(__file__).parent / "results" / "bad_inputs.json"
BUNDLES = ("sacb_net", "residual_aligner", "samconvex", "dual_flownet")
TRAINED = "sacb_net"
CODE = f"$__import__('os').system('touch {RAN}')"


class Case(NamedTuple):
    """A command with something wrong in it.

    Attributes:
        make: from a folder of its own to the command, ready to run.
        fits: see `outcomes.judged`.
    """

    name: str
    make: Callable[[Path], Callable[[], None]]
    fits: str = ""
    harmless: bool = False


class Good:
    """Files with nothing wrong in them, small: 24 x 26 x 22 voxels of 6 mm."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for role, seed in (("fixed", 0), ("moving", 3)):
            faults.nifti(faults.values(seed), folder / f"{role}.nii.gz")
            faults.nifti(faults.labels(seed), folder / f"{role}_label.nii.gz")
            (folder / f"{role}_points.csv").write_text("x,y,z\n1,2,3\n10,-20,5\n")
        parameters = "1 0 0 0 1 0 0 0 1 2 0 0"
        (folder / "shift.tfm").write_text(faults.TFM.format(faults.AFFINE_TYPE, parameters, "0 0 0"))
        moved = np.zeros(faults.ZERO_FIELD, np.float32)
        moved[..., 0] = np.sin(np.arange(faults.SIZE[1]) / 4)[None, :, None, None]
        faults.field(lambda: moved)(folder)

    def __getattr__(self, name: str) -> str:
        endings = {"shift": ".tfm", "field": ".nii.gz", "fixed_points": ".csv", "moving_points": ".csv"}
        return str(self.folder / (name + endings.get(name, ".nii.gz")))


def run_of(name: str, *words: str, config: str = "inference") -> Callable[[], None]:
    """A bundle's run on the command line; by `common run` where MONAI would take a word for one of its macros."""
    root = ROOT / "bundles" / name
    line = "--config_file", str(root / "configs" / f"{config}.json"), "--bundle_root", str(root), *words
    return common("run", *line) if any("=%" in word for word in words) else bundle(*line)


def register(good: Good, name: str, out: Path, **changed: str) -> Callable[[], None]:
    """A registration of the good pair, some of its words changed."""
    options = {"moving": good.moving, "fixed": good.fixed, "output_dir": str(out), "prealign": "none", "spacing": "6"}
    options |= {"device": "cpu"} | changed
    return run_of(name, *(f"--{option}={value}" for option, value in options.items() if value is not None))


def through_python(good: Good, name: str, out: Path, **changed: object) -> Callable[[], None]:
    from common.run.registrar import Registrar

    options = {"moving": good.moving, "fixed": good.fixed, "output_dir": out, "prealign": "none", "spacing": 6}

    def run() -> None:
        result = Registrar(ROOT / "bundles" / name, device="cpu").register(**(options | changed))
        print(*result.warnings, sep="\n")  # where a caller finds them

    return called(run)


# What may be done with a fitting warning, and what is harmless: by the fault's name, or by command and fault.
FITS = {
    "far away": "overlap|empty|outside",
    "voxels of 1e-9 mm": "overlap|empty|spacing|voxels|outside",
    "voxels of 1e6 mm": r"overlap|empty|spacing|voxels|outside|median \d{4,}",
    "series of one slice": "one slice|thickness",
    "one slice": "one slice|slices|overlap|empty|correlate|no improvement",
    "one voxel": "one voxel|overlap|empty|correlate",
    "all background": "no labels|nothing|empty|holds no label",
    "a scan": "labels",
    "quaternion of 5": "quaternion|unit|qform",
    "null device": "empty",
    "zeros": "empty|constant",
    "constant": "empty|constant",
    "singular": "singular|flat|empty|outside|overlap|inverse|folding",
    "never placed": "placed",
}
HARMLESS = {
    "": {"nan slope"},  # without an intercept, NaN is how NIfTI files say that there is none
    "apply": {"series of three", "one voxel", "one slice", "constant", "zeros", "plain matrix", "scan as a field"},
    "inverse": {"colours", "voxels of 1e-9 mm"},
    "grid": {"nan", "all nan", "infinite", "too large for 32 bits", "colours", "voxels of 1e-9 mm"}  # not read
    | {"cut in half", "cut plain", "cut at the end"},
    "label": {"huge codes", "codes below 0", "another size", "one slice"},
    "points": {"a header alone"},
}
HARMLESS["inverse"] |= HARMLESS["apply"]
HARMLESS["grid"] |= HARMLESS["apply"]


def scans(good: Good) -> Iterator[Case]:
    """A bad scan in every place that takes one."""
    for name, fault in faults.SCANS.items():
        for role in ("moving", "fixed"):
            for method in BUNDLES:
                yield _case(f"{method} --{role}", name, lambda f, m=method, r=role, t=fault: register(
                    good, m, f / "out", **{r: str(t(f))}))
            yield _case(f"report {role.upper()}", name, lambda f, r=role, t=fault: common(
                "report", *_placed(good, r, t(f)), good.field, str(f / "out")))
            yield _case(f"Registrar {role}", name, lambda f, r=role, t=fault: through_python(
                good, "samconvex", f / "out", **{r: str(t(f))}))
        for word, place in (("apply FILE", 0), ("apply --reference", 1)):
            yield _case(word, name, lambda f, p=place, t=fault: common(
                "apply", str(t(f)) if p == 0 else good.moving, good.field, str(f / "out.nii.gz"),
                f"--reference={good.fixed if p == 0 else t(f)}"), harmless="grid" if place else "apply")
        yield _case("invert --reference", name, lambda f, t=fault: common(
            "invert", good.field, str(f / "out.h5"), f"--reference={t(f)}"), harmless="inverse")
        yield _case("compose --reference", name, lambda f, t=fault: common(
            "compose", str(f / "out.nii.gz"), good.field, good.shift, f"--reference={t(f)}"), harmless="grid")


def _placed(good: Good, role: str, path: Path) -> tuple[str, str]:
    return (str(path), good.fixed) if role == "moving" else (good.moving, str(path))


def _case(command: str, fault: str, make: Callable[[Path], Callable[[], None]], harmless: str = "") -> Case:
    return Case(f"{command}: {fault}", make, FITS.get(fault, ""), fault in HARMLESS.get(harmless, set()) | HARMLESS[""])


def beside(good: Good) -> Iterator[Case]:
    """A bad label map, mask, list of points, transform or weights file."""
    for name, fault in faults.LABELS.items():
        for role in ("moving", "fixed"):
            both = {"moving_label": good.moving_label, "fixed_label": good.fixed_label}
            for kind in ("label", "mask"):
                yield _case(f"sacb_net --{role}_{kind}", name, lambda f, r=role, k=kind, b=both, t=fault: register(
                    good, "sacb_net", f / "out", **(b if k == "label" else {}), refine_steps="1",
                    **{f"{r}_{k}": str(t(f))}) if k == "mask" else register(
                    good, "sacb_net", f / "out", **(b | {f"{r}_label": str(t(f))})), harmless="label")
            yield _case(f"report --{role}_label", name, lambda f, r=role, b=both, t=fault: common(
                "report", good.moving, good.fixed, good.field, str(f / "out"),
                *(f"--{n}={v}" for n, v in (b | {f"{r}_label": str(t(f))}).items())), harmless="label")
        yield _case("apply --label", name, lambda f, t=fault: common(
            "apply", str(t(f)), good.field, str(f / "out.nii.gz"), f"--reference={good.fixed}", "--label"),
            harmless="label")
    for name, fault in faults.POINTS.items():
        yield _case("apply FILE of points", name, lambda f, t=fault: common(
            "apply", str(t(f)), good.field, str(f / "out.csv")), harmless="points")
        for role in ("moving", "fixed"):
            both = {"moving_points": good.moving_points, "fixed_points": good.fixed_points}
            yield _case(f"samconvex --{role}_points", name, lambda f, r=role, b=both, t=fault: register(
                good, "samconvex", f / "out", **(b | {f"{r}_points": str(t(f))})), harmless="points")
            yield _case(f"report --{role}_points", name, lambda f, r=role, b=both, t=fault: common(
                "report", good.moving, good.fixed, good.field, str(f / "out"),
                *(f"--{n}={v}" for n, v in (b | {f"{r}_points": str(t(f))}).items())), harmless="points")
    for name, fault in faults.TRANSFORMS.items():
        yield _case("apply TRANSFORM", name, lambda f, t=fault: common(
            "apply", good.moving, str(t(f)), str(f / "out.nii.gz"), f"--reference={good.fixed}"))
        yield _case("apply TRANSFORM to points", name, lambda f, t=fault: common(
            "apply", good.moving_points, str(t(f)), str(f / "out.csv"), "--inverse"))
        yield _case("compose TRANSFORM", name, lambda f, t=fault: common(
            "compose", str(f / "out.h5"), good.shift, str(t(f))))
        yield _case("invert TRANSFORM", name, lambda f, t=fault: common("invert", str(t(f)), str(f / "out.h5")))
        yield _case("report TRANSFORM", name, lambda f, t=fault: common(
            "report", good.moving, good.fixed, str(t(f)), str(f / "out")))
    for name, fault in faults.WEIGHTS.items():
        yield _case("samconvex --weights", name, lambda f, t=fault: register(
            good, "samconvex", f / "out", weights=str(t(f))))
        yield _case("samconvex training --weights", name, lambda f, t=fault: run_of(
            "samconvex", f"--weights={t(f)}", f"--output_dir={f / 'out'}", "--max_epochs=1", config="train"))
        yield _case("export --weights", name, lambda f, t=fault: common(
            "export", "samconvex", str(f / "out.pt2"), "32,32,32", f"--weights={t(f)}"))


def tables(good: Good) -> Iterator[Case]:
    """Bad tables of pairs, data lists, and groups of labels."""
    for name, content in faults.PAIRS.items():
        filled = content if isinstance(content, bytes) else content.replace("{fixed}", good.fixed)
        filled = filled if isinstance(filled, bytes) else filled.replace("{moving}", good.moving)
        fault = faults.text(filled, "pairs.csv")
        for method in ("sacb_net", "dual_flownet"):
            yield _case(f"{method} --pairs", name, lambda f, m=method, t=fault: register(
                good, m, f / "out", moving=None, fixed=None, pairs=str(t(f))))
    for name, content in faults.DATASETS.items():
        fault = faults.dataset(content)
        for method in ("sacb_net", "dual_flownet"):
            yield _case(f"{method} --dataset_dir", name, lambda f, m=method, t=fault: register(
                good, m, f / "out", moving=None, fixed=None, dataset_dir=str(t(f))))
            yield _case(f"{method} training --dataset_dir", name, lambda f, m=method, t=fault: run_of(
                m, f"--dataset_dir={t(f)}", f"--output_dir={f / 'out'}", "--max_epochs=1", config="train"))
    labelled = {"moving_label": good.moving_label, "fixed_label": good.fixed_label}
    for groups in ('{"a": {"members": [99999999999999]}}', '{"a": {"members": [-1]}}', '{"a": {"members": ["x"]}}',
                   '{"a": {"members": [1.5]}}', '{"a": {"members": []}}', '{"a": [1]}', "{}", '{"a": {}}', '"a"', "5",
                   '{"a": {"members": [null]}}', '{"a": {"members": 1}}', "[" * 5000):
        yield Case(f"sacb_net --groups {groups[:40]}", lambda f, g=groups: register(
            good, "sacb_net", f / "out", groups=g, **labelled), "groups: no label", groups == "{}")


WRONG = {
    "path": ("", "   ", CODE, "@moving", "%moving", "x" * 300),
    "word": ("", "xyz", "AFFINE", "1", CODE, "None,", "[affine]"),
    "whole": ("", "-1", "1.5", "two", "nan", "1e3", "1_000", CODE, "[1]", "None", "99999999999999999999", "True"),
    "number": ("", "-1", "nan", "inf", "-inf", "abc", "1,5", "2mm", CODE, "[1,2]", "1e400", "True", "0x10"),
    "numbers": ("", "-1", "nan", "[1,2]", "[1,2,3,4]", "abc", CODE, "[1,nan,2]", '["a","b","c"]'),
    "switch": ("", "maybe", "2", "tru", CODE, "[True]", "None,"),
    "range": ("", "5", "[5]", "[5,1]", "[1,1]", "[nan,1]", "[0,inf]", "[a,b]", CODE, "[1,2,3]", "0-1"),
    "grid": ("", "96", "[96,96]", "[96,96,0]", "[-1,2,3]", "[1.5,2,3]", "96x96x96", "[99999,99999,99999]", CODE),
    "device": ("", "0", "gpu", "cuda:99", "cuda:", "tpu", "xpu", "meta", "vulkan", CODE, "cpu cpu", "mps", "hpu:0"),
    "data": ("", "left", "5", CODE, "[" * 3000, "{", "$1"),
}
PYTHON = {
    "word": (5, ["affine"], b"affine", {}), "whole": ("two", 1.5, [1], None, True, {}, float("nan"), -1),
    "number": ("x", [1], {}, float("nan"), -1, True), "switch": ("maybe", 2, [True], {}),
    "range": ((1,), (5, 1), "a", 5, (1, None)), "grid": ((1, 2), 5, "a", (0, 1, 2), (1.5, 2, 3)),
    "device": (0, "gpu", ["cpu"], {}), "path": (5, [1], {}, b"a", ["a"], ""), "data": (5, object()),
}  # fmt: skip


def options(good: Good) -> Iterator[Case]:
    """Wrong words for every option of the tables; wrong values in Python."""
    for kind, table in (("inference", FOR_INFERENCE), ("train", FOR_TRAINING)):
        for name, option in table.items():
            method = option.of or _owner(name) or TRAINED
            for word in WRONG[option.kind]:
                if _taken(option, word):
                    continue
                name_only = name in ("output_dir", "ckpt_dir") and word[:1] in "$@%"  # a name like any other
                if kind == "inference":
                    yield Case(f"{method} --{name} {word[:50]!r}", lambda f, m=method, n=name, w=word: _inside(
                        f, register(good, m, f / "out", **{n: w})), "", name_only)
                else:
                    yield Case(f"{method} training --{name} {word[:50]!r}", lambda f, m=method, n=name, w=word: _inside(
                        f, _trained(m, f, n, w)), "", name_only)
            for value in PYTHON[option.kind] if kind == "inference" and name not in ("moving", "fixed") else ():
                if not (option.none and value is None) and not (option.empty and value == ""):
                    yield Case(f"Registrar {name}={value!r:.40}", lambda f, n=name, v=value, m=method: through_python(
                        good, m, f / "out", **{n: v}))


def _trained(method: str, folder: Path, name: str, word: str) -> Callable[[], None]:
    given = {"output_dir": str(folder / "out"), "max_epochs": "1", "epoch_length": "1", "spacing": "16"} | {name: word}
    return run_of(method, *(f"--{option}={value}" for option, value in given.items()), config="train")


def _owner(name: str) -> str:
    return next((method for method, names in OWN.items() if name in names), "")


def _taken(option: Option, word: str) -> bool:
    """What an option does take although it looks odd: a path that begins with a mark of MONAI's and is a name here."""
    if not word.strip():
        return option.empty
    if option.kind == "whole" and word == "-1":
        return option.low <= -1
    return option.kind == "data" and word == "5" or word == "None" and option.none


def words(good: Good) -> Iterator[Case]:
    """Lines that are wrong as a whole: commands, options, config files, places for results."""
    lines = {
        "no such command": ("aply", good.moving), "no words": ("apply",), "two words of three": ("apply", "a", "b"),
        "one word too many": ("apply", "a", "b", "c", "d"), "an unknown option": ("invert", "a", "b", "--refrence=c"),
        "an option twice": ("invert", "a", "b", "--reference=c", "--reference=d"),
        "an option without its value": ("invert", "a", "b", "--reference"), "compose of nothing": ("compose", "a.h5"),
        "apply without a reference": ("apply", good.moving, good.field, "out.nii.gz"),
        "a matrix of another tool": ("apply", good.moving, good.shift, "o.nii", f"--reference={good.fixed}",
                                     "--matrix=spm"),
        "one label map of two": ("report", good.moving, good.fixed, good.field, "out",
                                 f"--moving_label={good.moving_label}"),
        "spacing of a word": ("report", good.moving, good.fixed, good.field, "out", "--spacing=fine"),
        "spacing below 0": ("report", good.moving, good.fixed, good.field, "out", "--spacing=-1"),
        "spacing of nan": ("report", good.moving, good.fixed, good.field, "out", "--spacing=nan"),
        "spacing of 1e-6": ("report", good.moving, good.fixed, good.field, "out", "--spacing=1e-6"),
        "no such set": ("datalist", "mnist", "."), "a set that is not there": ("datalist", "oasis", "/nowhere"),
        "options of no bundle": ("options", "sacbnet"), "pack of no bundle": ("pack", "sacbnet"), "pack": ("pack",),
        "verify nothing": ("verify", "/nowhere.zip"), "verify by nonsense": ("verify", good.moving, "abc"),
        "export of no bundle": ("export", "sacbnet", "o.pt2", "32,32,32"),
        "export of two sizes": ("export", "samconvex", "o.pt2", "32,32"),
        "export of words": ("export", "samconvex", "o.pt2", "a,b,c"),
        "export of -1": ("export", "samconvex", "o.pt2", "32,32,-1"),
        "export of no size": ("export", "samconvex", "o.pt2", "None"),
        "export to another ending": ("export", "samconvex", "o.xyz", "32,32,32"),
        "export with a config that is missing": ("export", "samconvex", "o.pt2", "32,32,32", "--config=no.json"),
        "label without init": ("label", "start", "x"), "label of no bundle": ("label", "init", "app", "--bundles=xyz"),
        "deploy without run": ("deploy", "go", "a", "b", "c", "d"), "deploy of two words": ("deploy", "run", "a"),
        "deploy of scans that are missing": ("deploy", "run", "/nowhere", "/nowhere", "sacb_net", "out"),
        "phantom of nothing": ("phantom",), "phantom twice": ("phantom", "a", "b"),
    }  # fmt: skip
    for name, line in lines.items():
        yield Case(f"common {name}", lambda f, w=line: _inside(f, common(*w)))
    outputs = {"a folder that is a file": "{file}/out", "a file that is a folder": "{folder}", "no name": "",
               "no ending": "{folder}/out", "another ending": "{folder}/out.xyz",
               "a long name": "{folder}/" + "x" * 300,
               "the null device": "/dev/null/x.nii.gz"}  # fmt: skip
    for name, place in outputs.items():
        for command in ("apply", "points", "compose", "invert", "report", "phantom", "run", "datalist"):
            fine = command in ("report", "phantom", "run") and name in ("a file that is a folder", "no ending")
            fine |= command in ("report", "phantom", "run") and name == "another ending"
            if not fine:
                yield Case(f"{command} to {name}", lambda f, c=command, p=place: _inside(f, _to(good, c, f, p)))
    root = ROOT / "bundles" / "sacb_net"
    config = str(root / "configs" / "inference.json")
    runs = {
        "an unknown option": ("--movng=a",), "an option of another bundle": ("--features=mind",),
        "an option twice": ("--spacing=6", "--spacing=5"), "no value": ("--moving",), "a stray word": ("a.nii.gz",),
        "moving alone": (f"--moving={good.moving}",), "pairs and a pair": (f"--moving={good.moving}", "--pairs=a.csv"),
        "code in the network": (f"--network_def::channels={CODE}",),
        "an object": ('--inferer={"_target_": "os.abort"}',),
        "a root that is missing": ("--bundle_root=/nowhere",), "a root that is code": (f"--bundle_root={CODE}",),
        "an empty root": ("--bundle_root=",), "a root that is an import": ("--bundle_root=$import this",),
        "a path that is an import": ("--moving=$import this",), "one more root": (f"--bundle_root={root.parent}",),
    }  # fmt: skip
    (configs := good.folder / "configs").mkdir(exist_ok=True)
    for name, content in {"no.json": "{", "five.json": "5", "bytes.json": "\0", "other.json": '{"run": []}'}.items():
        (configs / name).write_text(content)
    misspelt = config[:-1], f"{config[:-5]}.yaml", config.replace("inference", "infrence"), str(configs), ""
    several = f"[{config},{configs}/gone.json]"
    for name in (*misspelt, "/nowhere/inference.json", several, *map(str, sorted(configs.iterdir()))):
        yield Case(f"common run of {Path(name).name!r:.40}", lambda f, n=name: _inside(
            f, common("run", f"--config_file={n}", f"--bundle_root={root}", f"--moving={good.moving}")))
    without = {"no config": (), "a stray word": ("a.json",), "missing arguments": ("--args_file=a.json",)}
    for name, line in without.items():
        yield Case(f"common run with {name}", lambda f, w=line: _inside(f, common("run", *w)))
    for name, line in runs.items():
        both = () if "root" in name else (f"--bundle_root={root}",)
        yield Case(f"run with {name}", lambda f, w=line, b=both: _inside(f, bundle(f"--config_file={config}", *b, *w)))


def _to(good: Good, command: str, folder: Path, place: str) -> Callable[[], None]:
    """A command whose result goes to a bad place."""
    (folder / "file").write_text("a file")
    (folder / "inner").mkdir()
    path = place.replace("{file}", str(folder / "file")).replace("{folder}", str(folder / "inner"))
    if command == "run":
        return register(good, "samconvex", folder / "out", output_dir=path)
    return common(*{
        "apply": ("apply", good.moving, good.field, path, f"--reference={good.fixed}"),
        "points": ("apply", good.moving_points, good.field, path), "compose": ("compose", path, good.field, good.shift),
        "invert": ("invert", good.field, path), "report": ("report", good.moving, good.fixed, good.field, path),
        "phantom": ("phantom", path), "datalist": ("datalist", "oasis", "/nowhere", f"--output={path}"),
    }[command])  # fmt: skip


def _inside(folder: Path, run: Callable[[], None]) -> Callable[[], None]:
    """The command, started in a folder of its own."""

    def started() -> None:
        os.chdir(folder)
        run()

    return started


FAMILIES = (scans, beside, tables, options, words)


def drawn(good: Good, count: int, seed: int) -> list[Case]:
    """Cases of all families in equal shares; another seed, others."""
    chance, chosen = random.Random(seed), []
    for n, family in enumerate(FAMILIES):
        cases = list(family(good))
        chosen += chance.sample(cases, min(count // len(FAMILIES) + (n < count % len(FAMILIES)), len(cases)))
    return chosen


def outcome(case: Case, folder: Path, limit: float = SECONDS) -> Outcome:
    """Run one case in a folder of its own, for at most so many CPU-seconds; what it said, without places of here."""
    folder.mkdir()
    run = case.make(folder)
    RAN.unlink(missing_ok=True)
    found = judged(run, fits=case.fits, harmless=case.harmless, out=folder, limit=limit)
    found = found._replace(said=re.sub(r"/\S*/site-packages/", "", found.said.replace(f"{folder.parent}/", "")))
    found = found._replace(said=found.said.replace(f"{ROOT}/", ""))
    if RAN.exists():
        RAN.unlink()
        return found._replace(kind="traceback", said="code was run: " + found.said)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name has this word")
    parser.add_argument("--json", default=str(RESULTS), help='file for the results, "" for none')
    parser.add_argument("--rows", default="", help="file of what is done")
    parser.add_argument("--minutes", type=float, default=0, help="after which a part ends")
    parser.add_argument("--all", action="store_true", help="print every case")
    asked = parser.parse_args()
    kept, end = Path(asked.rows) if asked.rows else None, time.monotonic() + 60 * asked.minutes
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept and kept.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "good").mkdir()
        good = Good(Path(folder) / "good")
        cases = drawn(good, asked.count, asked.seed)
        chosen = [case for case in cases if asked.only in case.name]
        for number, case in list(enumerate(chosen))[len(rows) :]:
            if asked.minutes and time.monotonic() > end:
                print(f"{len(rows)} of {len(chosen)} cases done")
                sys.exit(75)
            found = outcome(case, Path(folder) / str(number))
            rows.append({"case": case.name} | found._asdict())
            if kept:
                kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
            if asked.all or found.kind not in GOOD:
                print(f"{found.kind:10} {case.name}\n{'':11}{found.said}", flush=True)
    counts = collections.Counter(row["kind"] for row in rows)
    worst = {"seconds": max(row["seconds"] for row in rows), "gib": max(row["gib"] for row in rows)}
    print(json.dumps(counts | worst))
    if asked.json:
        told = {"seed": asked.seed, "cases": len(rows), "counts": counts, "worst": worst, "limits": [SECONDS, GIB]}
        bad = [row for row in rows if row["kind"] not in GOOD]
        Path(asked.json).write_text(json.dumps(told | {"bad": bad, "machine": hardware()}, indent=1) + "\n")
    sys.exit(any(row["kind"] not in GOOD for row in rows))


if __name__ == "__main__":
    main()
