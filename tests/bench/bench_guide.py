"""What landmarks that guide are worth, measured on others that do not.

    python tests/bench/bench_guide.py measure DATA [--what known,deep] [--pairs 2] [--steps 50] [--weights 0.1,0.01]
    python tests/bench/bench_guide.py table

DATA is the folder of the development data. One CPU thread.

known  real scans with known truth: T2 and FLAIR of one person at 2 mm, moved by a known smooth field (mean 2.75 mm,
       two fields each, as in bench_universal.py), to his T1; samconvex with MIND, steps of MIND. 40 of the 300 points
       guide: exact; or off by a normal draw of 1 mm along each axis, as a person would place them (1.6 mm in the mean);
       or 4 of them off by 15 mm. The last 150 are measured.
deep   dev_small/brain_t1_2mm, two people, samconvex, steps of LNCC; the landmarks are the middles of the manual labels
       of deep structures (of 20 voxels or more in both scans). Every second one guides; the others are measured, and
       the Dice of all of them. A middle is no expert's landmark: nothing says that the middles belong together.
brain  likewise with all labels: most are folds of the cortex, whose middles say little about a place.
lung   the phantom of the tests, 40 points guide and 40 are measured, 1.5 mm voxels.
"""

import json
import sys
from pathlib import Path

import fire
from machine import ROOT, hardware

sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "common"), str(ROOT / "bundles" / "samconvex")]
WHAT = ("lung", "known", "deep", "brain")
GUIDING, MEASURED = 40, 150  # of the points of "known"
KINDS = {"exact": (0.0, 0), "off by 1.6 mm": (1.0, 0), "exact, 4 wrong": (0.0, 4)}  # mm along each axis, how many
RESULT = Path(__file__).parent / "results" / "guide.json"
CORTEX = 100  # the first code of the cortex
LEAST = 20  # voxels of a label whose middle is a landmark


def middles(label, codes):
    """(N, 3) centres of the labels in voxels."""
    import numpy as np

    return np.stack([np.argwhere(label == code).mean(0) for code in codes])


def known(data, steps, weights):
    import tempfile

    import nibabel as nib
    import numpy as np
    import torch
    from bench_samconvex import network
    from bench_universal import known as moved

    from common.refine import refine
    from common.run.transforms import ScaleForegroundd
    from common.space.io import LPS_FROM_RAS
    from common.space.points import read_points

    def scan(path):
        values = torch.from_numpy(nib.load(path).get_fdata(dtype=np.float32))[None]
        return ScaleForegroundd(("image",))({"image": values})["image"][None].float()

    net, rows = network({"features": "mind"}), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, pair in moved(Path(data) / "dev", Path(folder)):
            if name not in ("T2, large", "FLAIR, large"):
                continue
            to_voxels = np.linalg.inv(LPS_FROM_RAS @ nib.load(pair["fixed"]).affine)
            marks = [read_points(pair[f"{role}_points"]).lps for role in ("fixed", "moving")]
            here, there = (torch.from_numpy(nib.affines.apply_affine(to_voxels, lps)).float() for lps in marks)
            image = torch.cat([scan(pair["moving"]), scan(pair["fixed"])], 1)
            with torch.no_grad():
                start = net(image).float()
            draw, contrast = torch.Generator().manual_seed(0), name.split(",")[0]
            guides = {"no guide": None}
            for kind, (off, wrong) in KINDS.items():
                goal = there[:GUIDING] + off / 2 * torch.randn(GUIDING, 3, generator=draw)
                goal[:wrong, 0] += 15 / 2
                for weight in weights:
                    guides[f"{kind}, {weight}"] = goal, weight
            for kind, guide in guides.items():
                chosen = None if guide is None else guide_of(here[:GUIDING], *guide)
                disp = refine(start, image, steps, similarity="mind", guide=chosen, progress=False)
                apart = distances(disp, here, there)
                before = 2 * (here - there).norm(dim=1)[-MEASURED:]
                for n, value in zip(("before", "guides", "others"), (before, apart[:GUIDING], apart[-MEASURED:])):
                    rows.setdefault(f"known, {contrast}, {kind}", {}).setdefault(n, []).append(float(value.mean()))
    return {name: {n: sum(v) / len(v) for n, v in row.items()} for name, row in rows.items()}


def guide_of(fixed, moving, weight):
    """On a grid of 2 mm."""
    import torch

    from common.refine import Guide

    return Guide(fixed, moving, 2 * torch.eye(3), weight)


def distances(disp, here, there):
    """mm, on a grid of 2 mm."""
    from common.fields import sample_at

    return 2 * (here + sample_at(disp[0], here.T).T - there).norm(dim=1)


def brains(data, pairs, steps, weights, deep):
    import numpy as np
    import torch
    from bench_samconvex import load, network, pairs_of

    from common.ops import warp
    from common.refine import refine

    net, rows = network({"features": "sam"}), {}
    for moving_case, fixed_case in pairs_of(Path(data) / "dev_small" / "brain_t1_2mm", pairs):
        (moving, moving_label), (fixed, fixed_label) = load(moving_case), load(fixed_case)
        image, labels = torch.cat([moving, fixed], 1), [x[0, 0].numpy() for x in (moving_label, fixed_label)]
        counts = [dict(zip(*np.unique(x, return_counts=True))) for x in labels]
        codes = [code for code in counts[0] if code and min(count.get(code, 0) for count in counts) >= LEAST]
        codes = [code for code in codes if code < CORTEX or not deep]
        there, here = (torch.from_numpy(middles(x, codes)).float() for x in labels)
        guides = slice(0, None, 2)
        with torch.no_grad():
            start = net(image).float()
        for weight in (0, *weights):
            name = f"guide, {weight}" if weight else "no guide"
            guide = guide_of(here[guides], there[guides], weight) if weight else None
            disp = refine(start, image, steps, guide=guide, progress=False)
            apart = distances(disp, here, there)
            warped = warp(moving_label, disp, mode="nearest")[0, 0].numpy()
            dice = [2 * ((warped == c) & (labels[1] == c)).sum() / (counts[1][c] + (warped == c).sum()) for c in codes]
            before = 2 * (here - there).norm(dim=1)
            values = before[1::2].mean(), apart[guides].mean(), apart[1::2].mean(), np.mean(dice)
            for n, value in zip(("before", "guides", "others", "dice"), values):
                rows.setdefault(name, {}).setdefault(n, []).append(float(value))
    what = "deep" if deep else "brain"
    return {f"{what}, {name}": {n: sum(v) / len(v) for n, v in row.items()} for name, row in rows.items()}


def lung(steps, weights):
    import torch
    from test_refine import breathing

    from common.fields import sample_at
    from common.refine import Guide, refine

    image, disp, points, there = breathing(40)
    rows = {}
    for weight in (0, *weights):
        guide = Guide(points[:40], there[:40], 1.5 * torch.eye(3), weight) if weight else None
        found = refine(torch.zeros_like(disp), image, steps, guide=guide, progress=False)
        apart = 1.5 * (points + sample_at(found[0], points.T).T - there).norm(dim=1)
        before = 1.5 * (points - there).norm(dim=1)[40:]
        row = {"before": before.mean(), "guides": apart[:40].mean(), "others": apart[40:].mean()}
        name = f"guide, {weight}" if weight else "no guide"
        rows[f"lung, {name}"] = {column: float(value) for column, value in row.items()}
    return rows


def measure(data, what=WHAT, pairs=2, steps=50, weights=(0.1, 0.01), output=str(RESULT)):
    import torch

    torch.set_num_threads(1)
    weights = weights if isinstance(weights, (tuple, list)) else (weights,)
    told = {"machine": hardware(), "pairs": pairs, "steps": steps}
    for name in what.split(",") if isinstance(what, str) else what:
        if name in ("lung", "known"):
            found = lung(steps, weights) if name == "lung" else known(data, steps, weights)
        else:
            found = brains(data, pairs, steps, weights, name == "deep")
        kept = json.loads(Path(output).read_text())["rows"] if Path(output).exists() else {}
        rows = {row: content for row, content in kept.items() if not row.startswith(name)} | found
        Path(output).write_text(json.dumps(told | {"rows": rows}, indent=1) + "\n")
    table(output)


def table(result=str(RESULT)):
    """The rows as they stand in common/run/README.md."""
    print("| | others before, mm | guides after, mm | others after, mm | Dice |\n|" + " --- |" * 5)
    for name, row in json.loads(Path(result).read_text())["rows"].items():
        cells = [f"{row[n]:.2f}" for n in ("before", "guides", "others")]
        cells.append(f"{row['dice']:.3f}" if "dice" in row else "")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    fire.Fire({"measure": measure, "table": table})
