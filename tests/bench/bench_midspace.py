"""Two scans, registered from either side: what --midspace makes of the two results.

    python tests/bench/bench_midspace.py measure DATA [--what visits] [--count 3] [--output FILE.json]
    python tests/bench/bench_midspace.py table

"visits" are the people with two scans in DATA/dev/brain_t1, 1 mm scans on a grid of 2 mm, after a rigid alignment;
"hippocampus" the first validation pairs of two people in DATA/dev/hippocampus_mr, on a grid of 1 mm, after an affine
one. samconvex with MIND and 20 steps. "apart": |T_ba(T_ab(x)) - x| in mm of the files of both directions, where the
fixed scan shows something. "Dice": mean over the labels of both scans, of either direction. "folding": in % of the
foreground. CPU seconds of a pair in a running process, one thread.
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
SETS = {"visits": "brain_t1", "hippocampus": "hippocampus_mr"}
OWN = {"visits": {"prealign": "rigid"}, "hippocampus": {"prealign": "affine", "spacing": 1.0}}
OPTIONS = {"features": "mind", "refine_steps": 20, "report": "none", "surface": False}


def measure(data, what="hippocampus", count=3, output=str(RESULT)):
    import numpy as np
    import torch

    from common.run.registrar import Registrar
    from common.space import io, mapping
    from common.space.transform_files import read_transform

    torch.set_num_threads(1)
    folder, options = Path(data) / "dev" / SETS[what], OPTIONS | OWN[what]
    content = json.loads((folder / "dataset.json").read_text())
    cases = {case["id"]: case for part in ("training", "validation") for case in content.get(part, [])}
    if what == "visits":
        people = {}
        for name, case in cases.items():
            people.setdefault(case["subject"], []).append(name)
        pairs = [dict(zip(("fixed", "moving"), both)) for both in people.values() if len(both) == 2][:count]
    else:
        pairs = [p for p in content["registration_pairs"] if p.get("kind", "inter-subject") == "inter-subject"][:count]
    registrar, rows = Registrar("samconvex", device="cpu", **options), {}
    for visits in ((pair["moving"], pair["fixed"]) for pair in pairs):
        scans, labels = ([str(folder / cases[v][kind]) for v in visits] for kind in ("image", "label"))
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
    kept = json.loads(Path(output).read_text()) if Path(output).exists() else {}
    told = {"machine": hardware(), "options": options, "pairs": pairs, "rows": rows}
    Path(output).write_text(json.dumps(kept | {what: told}, indent=1) + "\n")
    table(output)


KEYS = {"Dice before": "dice_before", "Dice": "dice_after", "folding": "folding_pct"}


def table(result=str(RESULT)):
    """The rows as they stand in common/run/README.md."""
    for what, content in json.loads(Path(result).read_text()).items():
        columns = list(next(iter(content["rows"].values())))
        print(f"| {what} | {' | '.join(columns)} |\n|" + " --- |" * (len(columns) + 1))
        for way, row in content["rows"].items():
            print(f"| {way} | {' | '.join(f'{sum(row[c]) / len(row[c]):.3f}' for c in columns)} |")


if __name__ == "__main__":
    fire.Fire({"measure": measure, "table": table})
