"""What landmarks that guide are worth, measured on others that do not.

    python tests/bench/bench_guide.py measure DATA [--what deep] [--pairs 2] [--steps 50] [--weight 0.1]
    python tests/bench/bench_guide.py table

DATA is the folder of the development data. Real brains: dev_small/brain_t1_2mm, the landmarks are the middles of its
manual labels (of 20 voxels or more in both scans). Every second one guides; the others are measured, and the Dice of
all of them. A middle is no expert's landmark: that of a fold of the cortex ("brain" has them all) says little about its
place, that of a deep structure ("deep") more. "lung": the phantom of the tests, 40 points guide and 40 are measured,
1.5 mm voxels. One CPU thread.
"""

import json
import sys
from pathlib import Path

import fire
from machine import ROOT, hardware

sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "common"), str(ROOT / "bundles" / "samconvex")]
RESULT = Path(__file__).parent / "results" / "guide.json"
CORTEX = 100  # the first code of the cortex
LEAST = 20  # voxels of a label whose middle is a landmark


def middles(label, codes):
    """(N, 3) centres of the labels in voxels."""
    import numpy as np

    return np.stack([np.argwhere(label == code).mean(0) for code in codes])


def brains(data, pairs, steps, weight, deep):
    import numpy as np
    import torch
    from bench_samconvex import load, network, pairs_of

    from common.fields import sample_at
    from common.ops import warp
    from common.refine import Guide, refine

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
        for name, guide in (
            ("no guide", None),
            ("guide", Guide(here[guides], there[guides], 2 * torch.eye(3), weight)),
        ):
            disp = refine(start, image, steps, guide=guide, progress=False)
            apart = 2 * (here + sample_at(disp[0], here.T).T - there).norm(dim=1)
            warped = warp(moving_label, disp, mode="nearest")[0, 0].numpy()
            dice = [2 * ((warped == c) & (labels[1] == c)).sum() / (counts[1][c] + (warped == c).sum()) for c in codes]
            before = 2 * (here - there).norm(dim=1)
            values = before[1::2].mean(), apart[guides].mean(), apart[1::2].mean(), np.mean(dice)
            for n, value in zip(("before", "guides", "others", "dice"), values):
                rows.setdefault(name, {}).setdefault(n, []).append(float(value))
    what = "deep" if deep else "brain"
    return {f"{what}, {name}": {n: sum(v) / len(v) for n, v in row.items()} for name, row in rows.items()}


def lung(steps, weight):
    import torch
    from test_refine import breathing

    from common.fields import sample_at
    from common.refine import Guide, refine

    image, disp, points, there = breathing(40)
    rows = {}
    for name, guide in (("no guide", None), ("guide", Guide(points[:40], there[:40], 1.5 * torch.eye(3), weight))):
        found = refine(torch.zeros_like(disp), image, steps, guide=guide, progress=False)
        apart = 1.5 * (points + sample_at(found[0], points.T).T - there).norm(dim=1)
        before = 1.5 * (points - there).norm(dim=1)[40:]
        row = {"before": before.mean(), "guides": apart[:40].mean(), "others": apart[40:].mean()}
        rows[f"lung phantom, {name}"] = {column: float(value) for column, value in row.items()}
    return rows


def measure(data, what="lung,deep,brain", pairs=2, steps=50, weight=0.1, output=str(RESULT)):
    import torch

    torch.set_num_threads(1)
    rows = json.loads(Path(output).read_text())["rows"] if Path(output).exists() else {}
    for name in what.split(",") if isinstance(what, str) else what:
        rows |= lung(steps, weight) if name == "lung" else brains(data, pairs, steps, weight, name == "deep")
    told = {"machine": hardware(), "pairs": pairs, "steps": steps, "weight": weight, "rows": rows}
    Path(output).write_text(json.dumps(told, indent=1) + "\n")
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
