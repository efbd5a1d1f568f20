"""How often the verdict is right: registrations whose error is known, good ones and spoilt ones.

    python tests/bench/bench_verdict.py measure DATA       # -> results/verdict.json, a row a registration
    python tests/bench/bench_verdict.py sides DATA         # renews two of its columns, in two minutes
    python tests/bench/bench_verdict.py renew DATA         # registers and measures anew what was not spoilt on purpose
    python tests/bench/bench_verdict.py table              # sensitivity and false alarms, half by half

DATA is the folder with dev and dev_small. Every registration runs on a 2 mm grid (hippocampus 1 mm, chest 3 mm), in one
process. The error of a registration is known: in mm where one scan of a person was moved by a known field (across
contrasts too, the phantom among them), as Dice of labels that the verdict does not see where two people were
registered.
"Good": the error fell by a fifth at least, or Dice rose by 0.02, and nothing was done to it. "Spoilt": something was
done to it (KINDS), or it ended no better than it began. What lies between is left out of both rates, and counted.
People are split: no one is in both halves.
"""

import json
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import fire
import numpy as np
import torch
from machine import ROOT, hardware
from scipy.ndimage import gaussian_filter

sys.path[:0] = [str(ROOT), *(str(ROOT / "bundles" / name) for name in ("sacb_net", "samconvex", "dual_flownet"))]

from common import fields, phantom  # noqa: E402
from common.mind import mind_features  # noqa: E402
from common.ops import warp  # noqa: E402
from common.quality import measure as measures  # noqa: E402
from common.quality import verdict  # noqa: E402
from common.quality.metrics import halved, label_overlap, mean_over_labels  # noqa: E402
from common.quality.sides import both_ways  # noqa: E402
from common.refine import refine  # noqa: E402
from common.space import geometry, io, mapping  # noqa: E402
from common.space.prealign import prealign  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "verdict.json"
KINDS = {
    "mirrored": "the moving scan mirrored left to right",
    "wrong organ": "the moving scan shows another organ, fitted to the same box",
    "other pair's": "the displacement that was found for another pair",
    "reversed": "every displacement the other way",
    "axes": "the first two components exchanged",
    "shifted": "18 mm off along one axis",
    "amplified": "the displacement three times as long",
    "noise": "a rough random field of 3 voxels added",
    "too strong": "25 steps of LNCC with almost no smoothness",
    "unfit": "a method that does not suit these scans; it ended no better than it began",
}


# ---- scans ----------------------------------------------------------------------------------------------------------


def grid_scan(path, spacing):
    """(I, J, K) scaled to [0, 1], on a grid of its own around its content, and the affine."""
    scan, affine = io.read_scan(str(path))
    size, onto = geometry.working_grid(scan.shape[1:], affine, spacing, box=geometry.foreground_box(scan[0]))
    return scaled(geometry.to_working_grid(scan[:1], affine, size, onto)[0]), onto


def scaled(scan):
    low, high = geometry.foreground_range(scan)
    return np.clip((scan - low) / (high - low), 0, 1).astype(np.float32)


def known_field(size, seed, length):
    """Smooth (3, I, J, K) in voxels: `length` of them in the mean square, over some ten voxels alike."""
    rng = np.random.default_rng(seed)
    field = np.stack([gaussian_filter(rng.normal(size=size), 9, mode="nearest") for _ in range(3)])
    return torch.from_numpy(field / np.sqrt((field**2).sum(0).mean()) * length).float()


def pair_of(fixed, moving, affine, name, half, *, truth=None, labels=None):
    return SimpleNamespace(fixed=fixed, moving=moving, affine=affine, name=name, half=half, truth=truth, labels=labels)


def moved(fixed, other, affine, name, half, seed, length=2.5):
    """Of two aligned scans of one person, the second moved by a known field v: T takes y + v(y) to y."""
    field = known_field(fixed.shape, seed, length)
    moving = warp(torch.from_numpy(other)[None, None], field[None], padding="zeros")[0, 0].numpy()
    return pair_of(fixed, moving, affine, name, half, truth=field)


def brains(data):
    """5 pairs a half of two people's T1 at 2 mm: of those that the networks were trained on, and of the others."""
    folder = Path(data) / "dev_small" / "brain_t1_2mm"
    known = json.loads((folder / "dataset.json").read_text())
    for half, part in (("A", "training"), ("B", "validation")):
        people = {case["subject"]: case for case in known[part]}  # the last scan of a person
        cases = list(people.values())
        for n in range(5):
            step = 1 + n // len(cases)
            fixed, moving = cases[n % len(cases)], cases[(n + step) % len(cases)]
            loaded = [io.read_scan(str(folder / case["image"])) for case in (fixed, moving)]
            labels = [io.read_label(str(folder / case["label"]))[0][0] for case in (fixed, moving)]
            scans = [scaled(scan[0]) for scan, _ in loaded]
            yield pair_of(*scans, loaded[0][1], f"t1 {fixed['id']} {moving['id']}", half, labels=labels)


def contrasts(data):
    """One person's contrasts, aligned by their source, one of them moved."""
    sources = {
        "A": ("ms", "brain_ms", {"T1": "patient07_T1", "T2": "patient07_T2", "FLAIR": "patient07_FLAIR"}),
        "B": ("glioma", "brain_glioma", {"T1": "t1_bet", "T2": "t2_bet", "FLAIR": "fla_bet"}),
    }
    for half, (short, folder, names) in sources.items():
        first, *others = names.values()
        scan, affine = io.read_scan(str(Path(data) / "dev" / folder / f"{first}.nii.gz"))
        box = geometry.foreground_box(scan[0])
        size, onto = geometry.working_grid(scan.shape[1:], affine, 2.0, box=box)
        scans = {}
        for name, file in names.items():
            array = io.read_scan(str(Path(data) / "dev" / folder / f"{file}.nii.gz"))[0]
            scans[name] = scaled(geometry.to_working_grid(array[:1], affine, size, onto)[0])
        for seed, (a, b) in enumerate([("T1", "T2"), ("T1", "FLAIR"), ("T2", "FLAIR"), ("T2", "T1"), ("T1", "T1")]):
            yield moved(scans[a], scans[b], onto, f"{short} {a} {b}", half, 10 * (half == "B") + seed)


def organs(data):
    """Hippocampus (labels), chest CT (known field), phantom (known field, and turned over)."""
    folder = Path(data) / "dev_small" / "hippocampus_mr"
    known = json.loads((folder / "dataset.json").read_text())
    for half, part in (("A", "training"), ("B", "validation")):
        cases = known[part][:5]
        for fixed, moving in zip(cases, cases[1:]):
            scans = [scaled(io.read_scan(str(folder / case["image"]))[0][0]) for case in (fixed, moving)]
            labels = [io.read_label(str(folder / case["label"]))[0][0] for case in (fixed, moving)]
            yield pair_of(*scans, np.eye(4), f"hippocampus {fixed['id']}", half, labels=labels)
    for half, file in (("A", "chest_01"), ("B", "chest_02")):
        scan, onto = chest(data, file)
        yield moved(scan, scan, onto, f"chest {file}", half, 30, 3.5)
    for half, seeds in (("A", (41, 42)), ("B", (43, 44))):
        for turned, seed in enumerate(seeds):
            size, affine = (80, 96, 80), np.array([[2, 0, 0, -79], [0, 2, 0, -95], [0, 0, 2, -79], [0, 0, 0, 1.0]])
            scan = phantom.sample(size, affine, seed=seed)[0]
            scan = scaled(scan.astype(np.float32))
            other = np.where(scan > 0, 1.1 - scan, 0).astype(np.float32) if turned else scan
            yield moved(scan, other, affine, f"phantom {seed}", half, seed)


@cache
def chest(data, file):
    (path,) = (Path(data) / "dev" / "chest_ct" / "images").glob(f"{file}*")
    scan, affine = io.read_scan(str(path))
    size, onto = geometry.working_grid(scan.shape[1:], affine, 4.0)
    scan = geometry.to_working_grid(scan[:1], affine, size, onto)[0]
    return np.clip((scan + 1000) / 2000, 0, 1).astype(np.float32), onto


def strangers(data, half):
    """Scans of other organs."""
    spine = {"A": "t1w", "B": "t2"}[half]
    yield chest(data, {"A": "chest_01", "B": "chest_02"}[half])[0]
    yield grid_scan(Path(data) / "dev" / "spine_t1_t2" / f"{spine}.nii.gz", 1.0)[0]


def fitted(scan, fixed):
    """A scan stretched to the grid of another, its content onto that one's: as an affine alignment may."""
    scan = torch.from_numpy(scan)[None, None]
    found = torch.nn.functional.interpolate(scan, fixed.shape, mode="trilinear", align_corners=True)[0, 0].numpy()
    return np.where(fixed > 0, found, 0).astype(np.float32) if (fixed == 0).mean() > 0.2 else found


# ---- registrations --------------------------------------------------------------------------------------------------


@cache
def network(name):
    from common.run.engines import load_weights

    root = ROOT / "bundles"
    if name == "mind":
        from samconvex import SAMConvex

        return SAMConvex(channels=1, features="mind", radii=(2, 3, 3)).eval()
    if name == "samconvex":
        from samconvex import SAMConvex

        made = SAMConvex(channels=1, features="sam", radii=(2, 3, 3))
    elif name == "sacb_net":
        from sacb_net import SACBNet

        made = SACBNet()
    else:
        from dual_flownet import DualFlowNet

        made = DualFlowNet(classes=27)
    return load_weights(made, str(root / name / "models" / "model.pt")).eval()


def image_of(fixed, moving):
    return torch.from_numpy(np.stack([moving, fixed]))[None]


@torch.no_grad()
def found_by(way, fixed, moving):
    """(3, I, J, K) displacement in voxels."""
    name, *steps = way.split("+")
    image = image_of(fixed, moving)
    padding = [p for n in reversed(fixed.shape) for p in (0, -n % 16)]
    disp = network(name)(torch.nn.functional.pad(image, padding))[:, :, : image.shape[2], : image.shape[3]].float()
    disp = disp[..., : image.shape[4]]
    for step in steps:
        similarity, count = step.split()
        disp = refine(disp, image, int(count), similarity=similarity, progress=False)
    return disp[0]


def too_strong(disp, fixed, moving):
    """Refinement with almost no price on roughness; what it folds is not mended."""
    import common.refine

    kept, common.refine.unfold = common.refine.unfold, lambda disp: disp
    try:
        options = {"smoothness": 0.002, "learning_rate": 1.0, "start_means": 0, "progress": False}
        return refine(disp[None], image_of(fixed, moving), 25, **options)[0]
    finally:
        common.refine.unfold = kept


# ---- rows -----------------------------------------------------------------------------------------------------------


def row_of(pair, disp, kind, way, *, moving=None, start=None):
    """What the verdict sees, what it says, and the error that it does not see."""
    moving = pair.moving if moving is None else moving
    onto = np.asarray(pair.affine, float)
    begin = mapping.affine_transform(np.eye(4))
    registration = measures.Registration(
        *(moving[None], onto, pair.fixed[None], onto),
        start=begin,
        whole=mapping.displacement_transform(disp.numpy(), onto),
        work=image_of(pair.fixed, moving)[0],
        disp=disp,
        work_affine=onto,
    )
    begun = time.process_time()
    row, _ = measures.measure(registration, measures.warp_pair(registration))
    row["measuring_cpu_s"] = time.process_time() - begun
    row |= {"pair": pair.name, "half": pair.half, "kind": kind, "way": way} | errors(pair, disp)
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()}


def errors(pair, disp):
    if pair.truth is not None:
        where = (torch.from_numpy(pair.fixed) > 0).nonzero().T[:, ::37].float()  # y, and x = y + v(y)
        v = fields.sample_at(pair.truth, where)
        there = where + v
        off = there + fields.sample_at(disp, there) - where
        mm = float(np.linalg.norm(pair.affine[:3, 0]))
        return {"error_before": float(v.norm(dim=0).mean()) * mm, "error_after": float(off.norm(dim=0).mean()) * mm}
    fixed, moving = (torch.from_numpy(np.ascontiguousarray(x)).long() for x in pair.labels)
    dice = []
    for field in (torch.zeros_like(disp), disp):
        label = warp(moving[None, None].float(), field[None], mode="nearest", padding="zeros")[0, 0].long()
        dice.append(mean_over_labels(label_overlap(fixed, label, moving, minimum=100), "dice"))
    return {"dice_hidden_before": dice[0], "dice_hidden_after": dice[1]}


def ways_of(pair):
    """Methods to run: those that suit the pair, and some that may not."""
    short, *words = pair.name.split()
    if short == "t1":
        return ("mind", "samconvex+lncc 30", "dual_flownet")
    if short in ("ms", "glioma") and words[0] != words[1]:
        return ("mind", "mind+mind 20", "samconvex+lncc 30", "sacb_net")
    if short == "phantom":
        return ("mind", "mind+mind 20", "samconvex+lncc 30")
    return ("mind", "mind+lncc 30")


def measure(data, output=str(RESULTS), only=None):
    """All rows; `only`: halves or names of pairs that begin so."""
    torch.set_num_threads(1)
    kept = json.loads(Path(output).read_text())["rows"] if Path(output).exists() else []
    last = {}
    for pair in (*brains(data), *contrasts(data), *organs(data)):
        if only and not pair.name.startswith(only):
            continue
        begin, good, rows, group = time.process_time(), None, [], pair.name.split()[0]
        for way in ways_of(pair):
            disp = found_by(way, pair.fixed, pair.moving)
            rows.append(row_of(pair, disp, "", way))
            good = disp if way in ("mind+mind 20", "samconvex+lncc 30", "mind+lncc 30") and good is None else good
        rows += spoilt(data, pair, good, last.get((pair.half, group, pair.fixed.shape)))
        last[pair.half, group, pair.fixed.shape] = good
        print(pair.half, pair.name, f"{time.process_time() - begin:.1f} CPU-s", flush=True)
        kept = [row for row in kept if row["pair"] != pair.name] + rows
        Path(output).write_text(json.dumps({"hardware": hardware(), "rows": kept}) + "\n")


def renew(data, *only, output=str(RESULTS)):
    """Register and measure anew the rows to which nothing was done: all good ones, and those of unfit methods.

    For a measure that concerns these. Rows that were spoilt on purpose stay without it. `only`: names that begin so.
    """
    torch.set_num_threads(1)
    kept = json.loads(Path(output).read_text())
    for pair in (*contrasts(data), *organs(data), *brains(data)):
        if only and not pair.name.startswith(only):
            continue
        rows = [row_of(pair, found_by(way, pair.fixed, pair.moving), "", way) for way in ways_of(pair)]
        kept["rows"] = [row for row in kept["rows"] if row["pair"] != pair.name or row["kind"]] + rows
        print(pair.half, pair.name, flush=True)
    Path(output).write_text(json.dumps(kept) + "\n")


def spoilt(data, pair, good, other):
    """Registrations that nobody should believe, made of a good one."""
    rng = np.random.default_rng(len(pair.name))
    rough = np.stack([gaussian_filter(rng.normal(size=pair.fixed.shape), 1.5) for _ in range(3)])
    rough = torch.from_numpy(rough / rough.std() * 3 / 3**0.5).float()
    step = 18.0 / float(np.linalg.norm(pair.affine[:3, 0]))
    made = {
        "reversed": -good,
        "axes": good[[1, 0, 2]],
        "shifted": good + torch.tensor([0.0, step, 0.0]).view(3, 1, 1, 1),
        "amplified": 3 * good,
        "noise": good + rough,
        "too strong": too_strong(good, pair.fixed, pair.moving),
    }
    if other is not None:
        made["other pair's"] = other
    for kind, disp in made.items():
        yield row_of(pair, disp, kind, "")
    flipped = mirrored(pair)
    yield row_of(pair, found_by("mind+mind 20", pair.fixed, flipped), "mirrored", "mind+mind 20", moving=flipped)
    if pair.name.split()[0] in ("t1", "ms", "glioma"):
        for stranger in strangers(data, pair.half):
            scan = fitted(stranger, pair.fixed)
            yield row_of(pair, found_by("mind", pair.fixed, scan), "wrong organ", "mind", moving=scan)


def mirrored(pair):
    """The moving scan with left and right exchanged, aligned anew."""
    flipped = np.ascontiguousarray(pair.moving[::-1])
    matrix = prealign(pair.fixed, pair.affine, flipped, pair.affine, "affine")
    return geometry.to_working_grid(flipped[None], pair.affine, pair.fixed.shape, pair.affine, matrix)[0]


def sides(data, *only, output=str(RESULTS)):
    """Measure the two columns anew that say whether left and right are exchanged, without any registration.

    They depend on the scans alone. `only`: names of pairs that begin so.
    """
    torch.set_num_threads(1)
    kept = json.loads(Path(output).read_text())
    for pair in (*brains(data), *contrasts(data), *organs(data)):
        if only and not pair.name.startswith(only):
            continue
        own = [row for row in kept["rows"] if row["pair"] == pair.name]
        strange = [row for row in own if row["kind"] == "wrong organ"]
        scans = [(pair.moving, [row for row in own if row["kind"] not in ("mirrored", "wrong organ")])]
        scans += [(mirrored(pair), [row for row in own if row["kind"] == "mirrored"])]
        if strange:
            others = (fitted(stranger, pair.fixed) for stranger in strangers(data, pair.half))
            scans += zip(others, ([row] for row in strange))
        for scan, rows in scans:
            features = [mind_features(torch.from_numpy(x)[None, None])[0] for x in (scan, pair.fixed)]
            found = both_ways(*features, halved(torch.from_numpy(pair.fixed) > 0))
            for row in rows:
                row |= dict(zip(("structure_aligned", "structure_mirrored"), (round(value, 5) for value in found)))
        print(pair.half, pair.name, flush=True)
    Path(output).write_text(json.dumps(kept) + "\n")


def truth(row):
    """Good, spoilt, or neither."""
    if row["kind"]:
        return "spoilt"
    if "error_before" in row:
        before, after = row["error_before"], row["error_after"]
        return "spoilt" if after >= before else "good" if after < 0.8 * before else "neither"
    gain = row["dice_hidden_after"] - row["dice_hidden_before"]
    return "spoilt" if gain <= 0 else "good" if gain >= 0.02 else "neither"


def rates(rows, half):
    """Lines of the table for a half: kind, how many, how many of them are doubtful."""
    counts = {}
    for row in rows:
        if row["half"] == half and (what := truth(row)) != "neither":
            name = "good" if what == "good" else row["kind"] or "unfit"
            total, doubtful = counts.get(name, (0, 0))
            counts[name] = total + 1, doubtful + bool(verdict.judge(row))
    spoilt_of = [counts[name] for name in KINDS if name in counts]
    counts["all spoilt"] = tuple(map(sum, zip(*spoilt_of)))
    return counts


def table(results=str(RESULTS)):
    """How many registrations of each kind the verdict calls doubtful, from the committed rows and today's rules."""
    rows = json.loads(Path(results).read_text())["rows"]
    halves = {half: rates(rows, half) for half in "AB"}
    print("| registrations | doubtful, half A (chosen on) | doubtful, half B |\n| --- | --- | --- |")
    for name in ("good", *KINDS, "all spoilt"):
        cells = [halves[half].get(name, (0, 0)) for half in "AB"]
        text = " | ".join(f"{n} of {total} ({100 * n / max(total, 1):.0f} %)" for total, n in cells)
        print(f"| {name}{': ' + KINDS[name] if name in KINDS else ''} | {text} |")
    left = [sum(row["half"] == half and truth(row) == "neither" for row in rows) for half in "AB"]
    print(f"\nNeither good nor spoilt, and left out: {left[0]} and {left[1]}.")


if __name__ == "__main__":
    fire.Fire({"measure": measure, "sides": sides, "table": table, "renew": renew})
