"""SAMConvex on the validation pairs of a dataset: Dice, CPU seconds, memory, beside convexAdam; its capture range.

    python tests/bench/bench_samconvex.py accuracy DATA
    python tests/bench/bench_samconvex.py levels DATA             # the paper's Table 3
    python tests/bench/bench_samconvex.py capture DATA
    python tests/bench/bench_samconvex.py size 192,160,256

Each writes its file in tests/bench/results, or --output; with --limit 2, for two pairs, only the latter. DATA is a
folder with dataset.json whose scans share one grid. Every pair of every variant runs on one thread in a process of its
own, the variants by turns; what it loads and builds once is not counted. "package" is convexAdam from PyPI with its
defaults, where it is installed. "capture", in one process, turns and shifts the moving scan, pads both by 16 voxels and
registers without pre-alignment or refinement; labels are interpolated once, by pose and registration together. "size"
runs one pair of the phantom, within two budgets of memory.
"""

import importlib.util
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import fire
from machine import ROOT, hardware, peak_gib

BUNDLE = ROOT / "bundles" / "samconvex"
sys.path[:0] = [str(ROOT), str(BUNDLE)]
VARIANTS = {  # options of the network, steps and similarity of the refinement
    "start": None,
    "package": None,
    "convexadam.json": ({"features": "convexadam"}, 80, "mind"),
    "mind": ({"features": "mind"}, 0, "lncc"),
    "mind + 50 steps on MIND": ({"features": "mind"}, 50, "mind"),
    "mind + 20 steps on LNCC": ({"features": "mind"}, 20, "lncc"),
    "sam": ({"features": "sam"}, 0, "lncc"),
    "sam + 50 steps on SAM": ({"features": "sam"}, 50, "features"),
    "sam + 20 steps on LNCC": ({"features": "sam"}, 20, "lncc"),
    "sam + 50 steps on LNCC": ({"features": "sam"}, 50, "lncc"),
}
TABLE3 = {"Pym1 N=3": [3], "Pym1 N=6": [6], "Pym2": [3, 3], "Pym3": [2, 3, 3]}
LEVELS = {f"sam, {name}": ({"features": "sam", "radii": radii}, 0, "lncc") for name, radii in TABLE3.items()}
RESULTS = Path(__file__).parent / "results"


def load(case):
    """Scan in [0, 1] and labels of one case, (1, 1, I, J, K)."""
    import torch

    from common.run.transforms import LoadScansd, ScaleForegroundd
    from common.train.transforms import ToTrainingGridd

    for transform in (LoadScansd(("image",), ("label",)), ToTrainingGridd(None), ScaleForegroundd(("image",))):
        case = transform(case)
    return [torch.as_tensor(case[key])[None].float() for key in ("image", "label")]


def pairs_of(data, limit=None):
    from common.train.data import list_scans, validation_pairs

    scans = {scan["id"]: scan for scan in list_scans(data, "validation")}
    return [(scans[moving], scans[fixed]) for moving, fixed in validation_pairs(data, limit=limit)]


def network(options):
    import torch

    from samconvex import MIND, SAMConvex

    if options["features"] == "convexadam":
        overlay = json.loads((BUNDLE / "configs" / "convexadam.json").read_text())
        options = {key.split("::")[1]: value for key, value in overlay.items() if key.startswith("network_def::")}
        options["features"] = MIND(stride=overlay["features"]["stride"])
    net = SAMConvex(**options).eval()
    if options["features"] == "sam":
        net.load_state_dict(torch.load(BUNDLE / "models" / "model.pt", weights_only=True))
    return net


def method(name):
    """A variant: image of a pair -> its displacement."""
    import torch

    from common.refine import refine

    def package(image):
        from convexAdam.convex_adam_MIND import convex_adam_pt

        moving, fixed = (255 * image[0]).numpy()
        return torch.as_tensor(convex_adam_pt(fixed, moving)).permute(3, 0, 1, 2)[None].float()

    if name in ("start", "package"):
        return package if name == "package" else lambda image: torch.zeros(1, 3, *image.shape[2:])
    options, steps, similarity = (VARIANTS | LEVELS)[name]
    net = network(options)
    features = net.features if similarity == "features" else None
    weight = {"smoothness": 0.5} if options.get("features") == "convexadam" else {}  # as in convexadam.json

    def ours(image):
        with torch.no_grad():
            disp = net(image)
        return refine(disp, image, steps, similarity=similarity, features=features, progress=False, **weight)

    return ours


def measure(disp, image, fixed_label, moving_label, pose=None):
    """Dice and regularity; the labels are those from before a `pose` (displacement), and interpolated once."""
    from common.fields import compose
    from common.ops import warp
    from common.quality.metrics import label_overlap, mean_over_labels, regularity

    fixed, moving = fixed_label[0, 0].long(), moving_label[0, 0].long()
    whole = disp if pose is None else compose(pose, disp)
    warped = warp(moving_label, whole, mode="nearest", padding="zeros")[0, 0].round().long()
    row = {"dice": mean_over_labels(label_overlap(fixed, warped, moving, minimum=100), "dice")}
    return row | regularity(disp, image[0, 1] > 0)


def in_a_process(work):
    """The dictionary that `work()` returns, with the CPU seconds it counted and the peak memory of its own process."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.close(read)
        row = work() | {"peak_gib": peak_gib()}
        with os.fdopen(write, "w") as file:
            file.write(json.dumps(row))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    os.wait()
    if not text:
        raise SystemExit("a process ended without a result, see above")
    return json.loads(text)


def one_pair(name, moving, fixed):
    import torch

    torch.set_num_threads(1)
    (moving, moving_label), (fixed, fixed_label) = load(moving), load(fixed)
    image, register = torch.cat([moving, fixed], 1), method(name)
    register(image[..., 16:48, 16:48, 16:48].contiguous())  # what a process loads and builds once is not counted
    begin = time.process_time()
    disp = register(image)
    seconds = time.process_time() - begin
    return measure(disp, image, fixed_label, moving_label) | {"cpu_s": seconds}


def whole(limit, file):
    """Where the result of all pairs is kept; nowhere for fewer."""
    return None if limit else RESULTS / file


def report(rows, output):
    if output:
        from common.publish.pack import sha256

        found = hardware() | {name: version(name) for name in ("convexAdam",) if importlib.util.find_spec(name)}
        weights = sha256(BUNDLE / "models" / "model.pt")
        content = {"rows": rows, "weights": weights, "hardware": found}
        Path(output).write_text(json.dumps(content, indent=1) + "\n")


def accuracy(data, variants=";".join(VARIANTS), limit=None, output=None, file="samconvex_accuracy.json"):
    """Every variant on every validation pair: the means, and the Dice of each pair."""
    names, output = variants.split(";"), output or whole(limit, file)
    if importlib.util.find_spec("convexAdam") is None and "package" in names:
        names.remove("package")
        print("convexAdam is not installed: no row for it")
    found = {name: [] for name in names}
    for moving, fixed in pairs_of(data, limit):  # by turns, so that a slow minute of the machine is one for all
        for name in names:
            found[name].append(in_a_process(lambda name=name, m=moving, f=fixed: one_pair(name, m, f)))
        rows = [
            {"variant": name}
            | {key: sum(r[key] for r in each) / len(each) for key in each[0]}
            | {"n": len(each), "dice_of_pairs": [r["dice"] for r in each]}
            for name, each in found.items()
        ]
        report(rows, output)
    text = "{variant:26s} {n} pairs  dice {dice:.4f}  folding {folding_pct:.3f} %  sdlogj {sdlogj:.3f}"
    for row in rows:
        print((text + "  {cpu_s:.1f} CPU-s  {peak_gib:.2f} GiB").format(**row), flush=True)


def levels(data, limit=None, output=None):
    """The pyramids of the paper's Table 3."""
    accuracy(data, ";".join(LEVELS), limit, output, file="samconvex_table3.json")


def pose_of(scan, turn, shift):
    """Displacement that turns a scan about its middle by a rotation vector (3), radians, and shifts it, (3) voxels."""
    import torch

    from common.fields import identity

    x, y, z = turn
    turn = torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]])).to(scan)
    grid = identity(tuple(scan.shape[2:]), like=scan)
    middle = (torch.tensor(scan.shape[2:]) - 1).view(1, 3, 1, 1, 1) / 2
    shift = torch.tensor(shift).to(scan).view(1, 3, 1, 1, 1)
    return torch.einsum("ij,bjxyz->bixyz", turn, grid - middle) + middle - shift - grid


def moved_pair(features, moving, fixed, turn, shift):
    import torch
    import torch.nn.functional as F

    from common.ops import warp

    torch.set_num_threads(1)
    moving, moving_label, fixed, fixed_label = (F.pad(x, (16,) * 6) for x in (*load(moving), *load(fixed)))
    pose = pose_of(moving, turn, shift)
    image = torch.cat([warp(moving, pose, padding="zeros"), fixed], 1)
    disp = {"start": torch.zeros_like(pose)}
    with torch.no_grad():
        disp |= {name: network({"features": name})(image) for name in features}
    return {name: measure(found, image, fixed_label, moving_label, pose)["dice"] for name, found in disp.items()}


def moves(kind, amount, draws, spacing, pair):
    """Rotation vectors (radians) and shifts (voxels) of one pair, the same draws for every kind and amount."""
    import numpy as np

    random, angle, length = np.random.default_rng(pair), np.radians(amount), amount / spacing
    for _ in range(draws if kind in ("turn", "shift", "both") else 1):
        axis, direction = (v / np.linalg.norm(v) for v in random.normal(size=(2, 3)))
        turn = angle * axis if kind in ("turn", "both") else np.zeros(3)
        along = np.array([1.0, 0.0, 0.0]) if kind == "along an axis" else direction
        yield turn.tolist(), (length * along if kind in ("shift", "both", "along an axis") else np.zeros(3)).tolist()


KINDS = ("turn", "shift", "both", "along an axis")
MOVES = [("none", 0), *[(kind, amount) for kind in KINDS for amount in (10, 20, 30)]]


def capture(data, limit=None, spacing=2.0, moved=MOVES, draws=2, output=None):
    """Dice of SAM and MIND features against moves of the moving scan: a turn (degrees) about a random axis, a shift
    (mm) in a random direction, both, a shift along the first axis. The loss is that against the pair as it is; its
    difference between the two comes with a standard error over the pairs, of means of their draws."""
    from statistics import mean, stdev

    rows, pairs, output = [], pairs_of(data, limit), output or whole(limit, "samconvex_capture.json")
    for kind, amount in [("none", 0), *[tuple(move) for move in moved if move[0] != "none"]]:
        found = []  # of each pair: the mean of its draws
        for n, (m, f) in enumerate(pairs):
            each = [moved_pair(("mind", "sam"), m, f, *move) for move in moves(kind, amount, draws, spacing, n)]
            found.append({key: mean(row[key] for row in each) for key in ("start", "mind", "sam")})
        still = rows[0]["dice_of_pairs"] if rows else found
        row = {"kind": kind, "amount": amount, "n": len(found), "draws": len(each)}
        row |= {key: mean(pair[key] for pair in found) for key in ("start", "mind", "sam")}
        loss = [{key: a[key] - b[key] for key in ("mind", "sam")} for a, b in zip(still, found)]
        less = [pair["mind"] - pair["sam"] for pair in loss]
        row |= {f"{key}_loss": mean(pair[key] for pair in loss) for key in ("mind", "sam")}
        row |= {"sam_loses_less_by": mean(less), "standard_error": stdev(less) / len(less) ** 0.5 if less[1:] else None}
        rows.append(row | {"dice_of_pairs": found})
        text = "{kind:13s} {amount:3d}  start {start:.3f}  mind {mind:.4f}  sam {sam:.4f}"
        print((text + "  SAM loses less by {sam_loses_less_by:.4f}").format(**row), flush=True)
        report(rows, output)


def size(voxels, features="sam,mind", budgets=(4.0, 0.5), steps=(0, 20), output=None):
    """CPU seconds and peak memory of one pair of so many voxels along each axis, the phantom; by default its file has
    the size in its name. A cost volume above a budget, in GiB, is computed in slabs. With the first features and
    budget also followed by so many steps of refinement."""
    import numpy as np
    import torch

    from common import phantom
    from common.refine import refine

    affine = np.diag([160.0 / voxels[0]] * 3 + [1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(voxels) - 1) / 2)
    scans = [phantom.sample(voxels, affine, d)[0] / 1000 for d in (phantom.Deformation(0), None)]
    image, rows = torch.from_numpy(np.stack(scans))[None].float(), []

    def work(name, budget, count):
        torch.set_num_threads(1)
        begin = time.process_time()
        with torch.no_grad():
            disp = network({"features": name, "budget": budget})(image)
        disp = refine(disp, image, count, progress=False)
        return {
            "features": name,
            "budget_gib": budget,
            "refine_steps": count,
            "size": list(voxels),
            "cpu_s": time.process_time() - begin,
            "mean_voxels": float(disp.norm(dim=1).mean()),
        }

    output = output or RESULTS / f"samconvex_{'x'.join(map(str, voxels))}.json"
    text = "{features:5s} {size}  budget {budget_gib} GiB  {refine_steps} steps  {cpu_s:.1f} CPU-s  {peak_gib:.2f} GiB"
    names = features.split(",") if isinstance(features, str) else features
    cases = [(name, budget, 0) for name in names for budget in budgets if 0 in steps]
    for case in cases + [(names[0], budgets[0], count) for count in steps if count]:
        rows.append(in_a_process(lambda case=case: work(*case)))
        print(text.format(**rows[-1]), flush=True)
        report(rows, output)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    fire.Fire({"accuracy": accuracy, "levels": levels, "capture": capture, "size": size})
