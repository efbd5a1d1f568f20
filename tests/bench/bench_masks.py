"""What masks save: a synthetic resection in real brains, and a real tumour, with and without its mask.

    python tests/bench/bench_masks.py resection DATA [--pairs 2] [--bundle samconvex] [--output FILE.json]
    python tests/bench/bench_masks.py alignment DATA [--pairs 2]
    python tests/bench/bench_masks.py tumour DATA
    python tests/bench/bench_masks.py table

DATA is the folder of the development data, which has dev_small and dev. "resection": a ball of 20 mm radius is set to 0
in one scan of a pair, and the result is compared with that of the intact pair, in mm outside of the ball; "alignment"
does so with the affine alignment alone. "tumour": another person's brain is registered with the T1 and with the T2 scan
of a person with a tumour, which lie on each other; what the two maps disagree, in mm outside of the tumour, is error.
One CPU thread.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import fire
from machine import ROOT, hardware

sys.path.insert(0, str(ROOT))
RESULT = Path(__file__).parent / "results" / "masks.json"
CENTRE, RADIUS = (-32.0, 4.0, 8.0), 20.0  # of the ball, mm from the middle of the grid
STEPS = 30


def keep(output, name, **content):
    """Put one part of the results into their file, and print it."""
    kept = json.loads(Path(output).read_text()) if Path(output).exists() else {}
    Path(output).write_text(json.dumps(kept | {name: {"machine": hardware()} | content}, indent=1) + "\n")
    table(output, name)


def table(result=str(RESULT), only=""):
    """The rows as they stand in common/run/README.md."""
    for name, content in json.loads(Path(result).read_text()).items():
        columns = list(next(iter(content["rows"].values())))
        if only in ("", name):
            print(f"| {name} | {' | '.join(columns)} |\n|" + " --- |" * (len(columns) + 1))
            for what, row in content["rows"].items():
                print(f"| {what} | {' | '.join(f'{row[c]:.2f}' for c in columns)} |", flush=True)


def add(rows, name, column, value):
    rows.setdefault(name, {}).setdefault(column, []).append(float(value))


def means(rows):
    return {name: {c: sum(v) / len(v) for c, v in row.items()} for name, row in rows.items()}


def resection(data, pairs=2, bundle="samconvex", output=str(RESULT)):
    """Mean error in mm within 20 mm of the ball, and in all of the brain outside of it."""
    import torch
    from bench_samconvex import load, pairs_of
    from monai.bundle import ConfigParser
    from scipy.ndimage import distance_transform_edt

    from common.holes import fill, spread
    from common.ops import warp
    from common.refine import refine

    torch.set_num_threads(1)
    parser = ConfigParser()
    parser.read_config(ROOT / "bundles" / bundle / "configs" / "inference.json")
    parser.update({"bundle_root": str(ROOT / "bundles" / bundle), "device": "cpu"})
    network = parser.get_parsed_content("network").eval()
    rows = {}
    for moving_case, fixed_case in pairs_of(Path(data) / "dev_small" / "brain_t1_2mm", pairs):
        moving, fixed = load(moving_case)[0], load(fixed_case)[0]
        intact = torch.cat([moving, fixed], 1)
        axes = [2 * (torch.arange(n) - (n - 1) / 2) for n in intact.shape[2:]]
        at = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        ball = (at - torch.tensor(CENTRE)).norm(dim=-1) < RADIUS
        with torch.no_grad():
            truth = network(intact).float()
        better = refine(truth, intact, STEPS, progress=False)
        for role in (0, 1):
            mask = torch.ones_like(intact)
            mask[0, role, ball] = 0
            cut = intact * mask
            known = (warp(mask[:, :1], truth) * mask[:, 1:] > 0.5)[0, 0]
            near = torch.from_numpy(distance_transform_edt(known.numpy(), sampling=2.0) < 20)
            outside = known & (fixed[0, 0] > 0)

            def error(name, disp, goal, outside=outside, near=near):
                length = 2 * (disp - goal).norm(dim=1)[0]
                add(rows, name, "near", length[outside & near].mean())
                add(rows, name, "outside", length[outside].mean())

            found = {}
            for name, image in (
                ("no mask", cut),
                ("filled from around", fill(cut, mask, other=False)),
                ("filled from the other scan", fill(cut, mask)),
            ):
                with torch.no_grad():
                    disp = network(image).float()
                error(f"network, {name}", disp, truth)
                there = warp(mask[:, :1], disp) * mask[:, 1:] > 0.5
                found[name] = image, disp if name == "no mask" else spread(disp, there)
            bare = found["no mask"]
            ways = {"no mask": (*bare, None), "mask in the steps only": (*bare, mask)}
            ways |= {f"mask everywhere, {name}": (*found[name], mask) for name in list(found)[1:]}
            for name, (image, disp, where) in ways.items():
                error(f"{STEPS} steps, {name}", refine(disp, image, STEPS, mask=where, progress=False), better)
    keep(output, "resection", bundle=bundle, pairs=pairs, rows=means(rows))


def alignment(data, pairs=2, output=str(RESULT)):
    """Mean error of the alignment in mm, in the brain outside of the ball."""
    import numpy as np
    import torch

    from common.space import io as scans
    from common.space.prealign import prealign

    torch.set_num_threads(1)
    rows, folder = {}, Path(data) / "dev" / "brain_t1"
    content = json.loads((folder / "dataset.json").read_text())
    images = {c["id"]: folder / c["image"] for part in ("training", "validation") for c in content.get(part, [])}
    chosen = [p for p in content["registration_pairs"] if p.get("kind", "inter-subject") == "inter-subject"][:pairs]
    for pair in chosen:
        (moving, moving_affine), (fixed, fixed_affine) = (scans.read_scan(images[pair[r]]) for r in ("moving", "fixed"))
        moving, fixed = moving[0], fixed[0]
        truth = prealign(fixed, fixed_affine, moving, moving_affine)
        for role, scan, affine in (("fixed", fixed, fixed_affine), ("moving", moving, moving_affine)):
            at = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in scan.shape], indexing="ij"), -1)
            ball = np.linalg.norm(at @ affine[:3, :3].T - CENTRE, axis=-1) < RADIUS
            cut = {"fixed": fixed, "moving": moving} | {role: scan * ~ball}
            hole = ball if role == "fixed" else np.zeros(fixed.shape, bool)
            points = np.argwhere((fixed > 0) & ~hole)[::50] @ fixed_affine[:3, :3].T + fixed_affine[:3, 3]
            points = np.c_[points, np.ones(len(points))]
            for name, mask in (("no mask", {}), ("mask", {f"{role}_mask": ~ball})):
                found = prealign(cut["fixed"], fixed_affine, cut["moving"], moving_affine, **mask)
                length = np.linalg.norm(points @ (found - truth)[:3].T, axis=1)
                add(rows, f"alignment, {name}", "outside", length.mean())
                print(pair, role, name, round(float(length.mean()), 3), flush=True)
    keep(output, "alignment", pairs=pairs, rows=means(rows))


def tumour(data, bundle="samconvex", output=str(RESULT)):
    """Mean disagreement in mm, within 20 mm of the tumour and in all of the brain outside of it."""
    import numpy as np
    import torch
    from scipy.ndimage import distance_transform_edt

    from common.run.registrar import Registrar
    from common.space import mapping
    from common.space.io import LPS_FROM_RAS, read_label, read_scan

    torch.set_num_threads(1)
    folder = Path(data) / "dev" / "brain_glioma"
    lesion, affine = read_label(folder / "tumour_simple.nii.gz")
    brain = read_scan(folder / "t1_bet.nii.gz")[0][0] > 0
    distance = distance_transform_edt(lesion[0] == 0)
    rows, lps = {}, LPS_FROM_RAS @ affine
    chosen = {"near": (distance > 0) & (distance < 20), "outside": distance > 0}
    chosen = {c: np.argwhere(brain & where)[::40] @ lps[:3, :3].T + lps[:3, 3] for c, where in chosen.items()}
    registrar = Registrar(ROOT / "bundles" / bundle, device="cpu", features="mind", refine_similarity="mind")
    moving = sorted((Path(data) / "dev" / "brain_t1" / "images").glob("oasis_1003.nii.gz"))[0]
    for name, options in (("no mask", {}), ("mask", {"fixed_lesion": str(folder / "tumour_simple.nii.gz")})):
        for steps in (0, STEPS):
            with contextlib.redirect_stdout(io.StringIO()):
                fixed = [folder / f"{contrast}_bet.nii.gz" for contrast in ("t1", "t2")]
                found = [registrar.register(moving, f, refine_steps=steps, **options).transform for f in fixed]
            maps = {f"{STEPS} steps" if steps else "network": found}
            if not steps:
                maps["alignment"] = [mapping.parts(transform)[-1] for transform in found]
            for what, both in maps.items():
                for column, points in chosen.items():
                    one, other = (mapping.map_points(transform, points) for transform in both)
                    add(rows, f"{what}, {name}", column, np.linalg.norm(one - other, axis=1).mean())
    keep(output, "tumour", bundle=bundle, rows=means(rows))


if __name__ == "__main__":
    fire.Fire({"resection": resection, "alignment": alignment, "tumour": tumour, "table": table})
