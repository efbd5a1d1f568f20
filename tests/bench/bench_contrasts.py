"""Two contrasts: the phantom pair with the grey values of its moving scan turned over, dark for bright.

    python tests/bench/bench_contrasts.py [--output FILE.json]

One process, from files to files, as `monai.bundle run` with the options in the first column; a row a way, with the mean
and the largest distance of the 12 landmarks in mm, which are known exactly, and what the verdict says.
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import fire
from machine import ROOT, hardware

sys.path.insert(0, str(ROOT))
WAYS = {
    "samconvex": ("samconvex", {}),
    "sacb_net": ("sacb_net", {}),
    "samconvex --features mind": ("samconvex", {"features": "mind"}),
    "samconvex --features mind --refine_steps 50": ("samconvex", {"features": "mind", "refine_steps": 50}),
    "samconvex --features mind --refine_steps 50 --refine_similarity mind": (
        "samconvex",
        {"features": "mind", "refine_steps": 50, "refine_similarity": "mind"},
    ),
}


def turned_over(folder):
    """The phantom's files in `folder`, the moving scan turned over inside the brain; background stays 0."""
    from common.run.example import write_phantom
    from common.space.io import read_scan, write_scan

    row = write_phantom(Path(folder))
    scan, affine = read_scan(row["moving"])
    inside = scan[0] > 0
    scan[0][inside] = scan[0].max() + scan[0][inside].min() - scan[0][inside]
    write_scan(scan, affine, Path(row["moving"]))
    return row


def main(ways=None, spacing=2.0, output=None):
    """Measure the ways named (separated by ";")."""
    from common.run.registrar import Registrar

    rows = []
    print("| way | landmarks before, mm | after, mm | largest after, mm | verdict |\n|" + " --- |" * 5)
    for name in ways.split(";") if ways else WAYS:
        bundle, options = WAYS[name]
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            pair = turned_over(f"{folder}/in")
            marks = {kind: pair[kind] for kind in ("moving_points", "fixed_points")}
            registrar = Registrar(ROOT / "bundles" / bundle, device="cpu", spacing=spacing, **options)
            found = registrar.register(pair["moving"], pair["fixed"], **marks).row
        row = {"way": name, "before": found["tre_mm_before"], "after": found["tre_mm_after"]}
        row |= {"largest": found["tre_max_mm_after"], "warnings": found["warnings"]}
        rows.append(row)
        numbers = "{before:.2f} | {after:.2f} | {largest:.2f}".format(**row)
        print(f"| `{name}` | {numbers} | {'doubtful' if row['warnings'] else 'plausible'} |", flush=True)
    if output:
        Path(output).write_text(json.dumps({"hardware": hardware(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
