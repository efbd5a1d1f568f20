"""Two visits of one person, registered from either side: what --midspace makes of the two results.

    python tests/bench/bench_midspace.py measure DATA [--output FILE.json]
    python tests/bench/bench_midspace.py table

The visits are the pairs of one person in DATA/dev/brain_t1, 1 mm scans on a grid of 2 mm, rigid alignment, samconvex
with MIND and 20 steps. "apart": |T_ba(T_ab(x)) - x| in mm of the files of both directions, at voxels of the brain.
"Dice": mean over the labels of both visits, of either direction. "folding": in % of the brain. CPU seconds of a pair in
a running process, one thread.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import fire
from machine import ROOT, hardware

sys.path.insert(0, str(ROOT))
RESULT = Path(__file__).parent / "results" / "midspace.json"
VISITS = (("1003", "1023"), ("1004", "1024"), ("1018", "1038"))
OPTIONS = {"features": "mind", "refine_steps": 20, "prealign": "rigid", "report": "none", "surface": False}


def measure(data, output=str(RESULT), count=len(VISITS)):
    import numpy as np
    import torch

    from common.run.registrar import Registrar
    from common.space import io, mapping
    from common.space.transform_files import read_transform

    torch.set_num_threads(1)
    folder = Path(data) / "dev" / "brain_t1"
    registrar, rows = Registrar("samconvex", device="cpu", **OPTIONS), {}
    for visits in VISITS[:count]:
        scans, labels = ([str(folder / kind / f"oasis_{v}.nii.gz") for v in visits] for kind in ("images", "labels"))
        for way, midspace in (("one way", False), ("--midspace True", True)):
            with tempfile.TemporaryDirectory() as place:
                found, begun = [], sum(os.times()[:2])
                for number, order in enumerate(((0, 1), (1, 0))):
                    names = {"moving_label": labels[order[0]], "fixed_label": labels[order[1]]}
                    pair = [scans[n] for n in order]
                    found.append(registrar.register(*pair, f"{place}/{number}", midspace=midspace, **names))
                seconds = (sum(os.times()[:2]) - begun) / 2
                maps = [read_transform(result.folder / "transform.h5") for result in found]
            lps = io.LPS_FROM_RAS @ found[0].affine
            points = np.argwhere(found[0].pair.fixed[0] > 0)[::100] @ lps[:3, :3].T + lps[:3, 3]
            apart = np.linalg.norm(mapping.map_points(mapping.compose(*maps), points) - points, axis=1)
            row = {"apart, mean": apart.mean(), "apart, 99 %": np.percentile(apart, 99)}
            row |= {n: np.mean([result.row[key] for result in found]) for n, key in KEYS.items()} | {"CPU-s": seconds}
            for name, value in row.items():
                rows.setdefault(way, {}).setdefault(name, []).append(float(value))
            print(visits, way, {name: round(float(value), 4) for name, value in row.items()}, flush=True)
    told = {"machine": hardware(), "options": OPTIONS, "visits": VISITS[:count], "rows": rows}
    Path(output).write_text(json.dumps(told, indent=1) + "\n")
    table(output)


KEYS = {"Dice before": "dice_before", "Dice": "dice_after", "folding": "folding_pct"}


def table(result=str(RESULT)):
    """The rows as they stand in common/run/README.md."""
    rows = json.loads(Path(result).read_text())["rows"]
    columns = list(next(iter(rows.values())))
    print(f"| | {' | '.join(columns)} |\n|" + " --- |" * (len(columns) + 1))
    for way, row in rows.items():
        print(f"| {way} | {' | '.join(f'{sum(row[c]) / len(row[c]):.3f}' for c in columns)} |")


if __name__ == "__main__":
    fire.Fire({"measure": measure, "table": table})
