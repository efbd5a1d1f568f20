"""The weights from made-up shapes beside untrained MIND and others: across contrasts with known truth, and by labels.

    python tests/bench/bench_universal.py measure DATA1MM DATA2MM            # or --sets "known,spine" --ways "..."
    python tests/bench/bench_universal.py table

DATA1MM holds brain_ms and spine_t1_t2, DATA2MM brain_t1_2mm and hippocampus_mr. One thread, a process a way.

known        T1, T2 and FLAIR of one person at 2 mm, moved by a known smooth field (mean length 2.75 or 1.46 mm), to his
             T1: mean distance in mm at 300 points inside the brain, two fields each
t1, turned   the validation pairs of the brains, and the same with the contrast of the moving scan turned over
             (common.train.transforms.PseudoT2d): Dice over labels above 100 voxels
hippocampus  its validation pairs: Dice
spine        T2 to T1 of one person, the cord's masks: Dice
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire
from machine import ROOT, hardware, one_thread

sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).parent / "results" / "universal.json"
UNIVERSAL = ROOT / "bundles/sacb_net/configs/universal.json"
MIND = {"features": "mind"}
BY_MIND = {"refine_similarity": "mind"}
SMOOTHNESS = {"samconvex, MIND, 50 MIND steps, smoothness 0.5": 0.5}  # of the refinement, by a config of its own
WAYS = {  # row: bundle, config, options
    "universal": ("sacb_net", UNIVERSAL, {}),
    "universal, 20 MIND steps": ("sacb_net", UNIVERSAL, BY_MIND | {"refine_steps": 20}),
    "universal, 50 MIND steps": ("sacb_net", UNIVERSAL, BY_MIND | {"refine_steps": 50}),
    "samconvex, MIND": ("samconvex", "", MIND),
    "samconvex, MIND, 20 MIND steps": ("samconvex", "", MIND | BY_MIND | {"refine_steps": 20}),
    "samconvex, MIND, 50 MIND steps": ("samconvex", "", MIND | BY_MIND | {"refine_steps": 50}),
    "samconvex, MIND, 50 MIND steps, smoothness 0.5": ("samconvex", "", MIND | BY_MIND | {"refine_steps": 50}),
    "samconvex, MIND, 50 LNCC steps": ("samconvex", "", MIND | {"refine_steps": 50}),
    "sacb_net, brain weights": ("sacb_net", "", {}),
    "ANTs SyN (Mattes)": "antspyx",
}
SETS = ("known", "t1", "turned", "hippocampus", "spine")
MOTIONS = {"large": 2.75, "small": 1.46}  # mm in the mean


def write(path, scan, affine):
    import nibabel as nib

    nib.save(nib.Nifti1Image(scan, affine), path)
    return str(path)


def known(data, folder):
    """Pairs with the points that belong together: the field is drawn from a seed on two lattices, then smoothed."""
    import nibabel as nib
    import numpy as np
    import torch
    import torch.nn.functional as F

    from common.fields import invert
    from common.ops import warp
    from common.refine import smooth
    from common.space.points import Points, write_points

    scans = {}
    for contrast in ("T1", "T2", "FLAIR"):
        image = nib.load(Path(data, "brain_ms", f"patient07_{contrast}.nii.gz"))
        scan = F.avg_pool3d(torch.as_tensor(image.get_fdata(dtype=np.float32))[None, None], 2)
        scans[contrast] = scan[..., 4:84, 6:102, :80]
    affine = image.affine @ nib.affines.from_matvec(2 * np.eye(3), (8.5, 12.5, 0.5))
    inside = (scans["T1"] > 0).float()
    deep = -F.max_pool3d(-inside, 5, 1, 2)[0, 0] > 0
    fixed = write(folder / "fixed.nii.gz", scans["T1"][0, 0].numpy(), affine)
    for seed in range(2):
        draw = torch.Generator().manual_seed(seed)
        field = sum(
            share * F.interpolate(torch.randn(1, 3, *knots, generator=draw), inside.shape[2:], mode="trilinear")
            for knots, share in (((5, 6, 5), 1.0), ((8, 10, 8), 0.5))
        )
        field = smooth(field, times=6)
        length = 2 * (field.square().sum(1).sqrt() * inside[0]).sum() / inside.sum()  # mm: voxels of 2 mm
        chosen = deep.nonzero()[torch.randperm(int(deep.sum()), generator=draw)[:300]]
        for motion, mean in MOTIONS.items():
            disp = field * mean / length
            there = chosen.numpy() + disp[0][:, *chosen.T].T.numpy()
            points = {}
            for name, voxels in (("fixed", chosen.numpy()), ("moving", there)):
                lps = nib.affines.apply_affine(np.diag([-1, -1, 1, 1]) @ affine, voxels)
                points[f"{name}_points"] = str(folder / f"{name}_{motion}_{seed}.fcsv")
                write_points(Points(lps, [str(n) for n in range(len(lps))]), points[f"{name}_points"])
            for contrast, scan in scans.items():
                moved = warp(scan, invert(disp), padding="zeros")[0, 0].numpy()
                moving = write(folder / f"{contrast}_{motion}_{seed}.nii.gz", moved, affine)
                yield f"{contrast}, {motion}", {"moving": moving, "fixed": fixed, "prealign": "none"} | points


def pairs(data, folder, *, turned=False):
    """The registration pairs of a dataset.json; `turned`: the moving scan's contrast turned over, label by label."""
    from monai.data import MetaTensor

    from common.run.data import dataset_pairs
    from common.space.io import read_label, read_scan
    from common.train.transforms import PseudoT2d

    for number, row in enumerate(dataset_pairs(str(data))):
        pair = {name: row[name] for name in ("moving", "fixed", "moving_label", "fixed_label")}
        if turned:
            (scan, affine), (label, _) = read_scan(pair["moving"]), read_label(pair["moving_label"])
            scan = scan / scan.max()
            found = PseudoT2d()({"moving": MetaTensor(scan, affine), "moving_label": MetaTensor(label, affine)})
            pair["moving"] = write(folder / f"{number}.nii.gz", found["moving"].numpy()[0], affine)
        yield "", pair | {"prealign": "none", "minimum": 100}


def cases(name, data1mm, data2mm, folder):
    """Name of the row and options of the registration, for every pair of a set."""
    if name == "known":
        yield from known(data1mm, folder)
    elif name in ("t1", "turned"):
        yield from pairs(Path(data2mm, "brain_t1_2mm"), folder, turned=name == "turned")
    elif name == "hippocampus":
        for row, pair in pairs(Path(data2mm, "hippocampus_mr"), folder):
            yield row, pair | {"minimum": 0, "spacing": 1.0, "crop": False}
    else:
        files = {"moving": "t2", "fixed": "t1w", "moving_label": "t2_seg-manual", "fixed_label": "t1w_seg-manual"}
        place = Path(data1mm, "spine_t1_t2")
        pair = {key: str(place / f"{file}.nii.gz") for key, file in files.items()}
        yield "", pair | {"prealign": "rigid", "spacing": 1.0, "crop": False}


def by_tool(pair):
    """What ANTs' SyN by mutual information makes of a pair: the same measure."""
    import ants
    import numpy as np

    from common.space.points import read_points

    moving, fixed = (ants.image_read(pair[name]) for name in ("moving", "fixed"))
    kind = "SyNOnly" if pair["prealign"] == "none" else "SyNRA"
    with tempfile.TemporaryDirectory() as folder:
        options = {"syn_metric": "mattes", "random_seed": 1, "outprefix": f"{folder}/"}
        found = ants.registration(fixed, moving, kind, **options)["fwdtransforms"]
        if "fixed_points" in pair:
            import pandas

            here, there = (read_points(pair[f"{name}_points"]).lps for name in ("fixed", "moving"))
            table = pandas.DataFrame(here, columns=list("xyz"))
            mapped = ants.apply_transforms_to_points(3, table, found)[list("xyz")].to_numpy()
            return float(np.linalg.norm(mapped - there, axis=1).mean())
        label = ants.image_read(pair["moving_label"])
        warped = ants.apply_transforms(fixed, label, found, interpolator="nearestNeighbor").numpy()
    return dice(warped, ants.image_read(pair["fixed_label"]).numpy(), pair.get("minimum", 0))


def dice(warped, fixed, minimum):
    import torch

    from common.quality.metrics import label_overlap, mean_over_labels

    maps = [torch.as_tensor(x.round().astype(int)) for x in (fixed, warped)]
    return float(mean_over_labels(label_overlap(*maps, minimum=minimum), "dice"))


def child(way, name, data1mm, data2mm, output):
    import torch

    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(WAYS[way], tuple):
            from common.run.registrar import Registrar

            bundle, config, options = WAYS[way]
            if way in SMOOTHNESS:
                config = Path(folder, "smoothness.json")
                config.write_text(json.dumps({"inferer::smoothness": SMOOTHNESS[way]}))
            registrar = Registrar(ROOT / "bundles" / bundle, config=config, device="cpu", surface=False, **options)
        for row, pair in cases(name, data1mm, data2mm, Path(folder)):
            begin = time.process_time()
            if WAYS[way] == "antspyx":
                value, doubts = by_tool(pair), []
            else:
                scans = pair.pop("moving"), pair.pop("fixed")
                result = registrar.register(*scans, **pair)
                value = result.row["tre_mm_after" if "fixed_points" in pair else "dice_after"]
                doubts = result.warnings
            entry = found.setdefault(row, {"values": [], "cpu_s": [], "doubtful": 0})
            entry["values"].append(round(float(value), 4))
            entry["cpu_s"].append(time.process_time() - begin)
            entry["doubtful"] += bool(doubts)
    Path(output).write_text(json.dumps(found))


def measure(data1mm, data2mm, sets=",".join(SETS), ways=";".join(WAYS), output=str(RESULTS), tools_python=""):
    """Measure, keeping the other rows of `output`; ANTs by a Python that has antspyx, if one is named."""
    content = json.loads(Path(output).read_text()) if Path(output).exists() else {"rows": {}}
    for way in ways.split(";"):
        for name in sets.split(",") if isinstance(sets, str) else sets:
            program = tools_python if WAYS[way] == "antspyx" else sys.executable
            if not program:
                continue
            with tempfile.TemporaryDirectory() as folder:
                words = ["child", json.dumps(way), name, str(data1mm), str(data2mm), f"{folder}/found.json"]
                line = [program, __file__, *words]
                subprocess.run(line, env=one_thread(), check=True, stdout=subprocess.DEVNULL)
                for row, entry in json.loads(Path(folder, "found.json").read_text()).items():
                    entry["mean"] = round(sum(entry["values"]) / len(entry["values"]), 4)
                    entry["cpu_s"] = round(sum(entry["cpu_s"]) / len(entry["cpu_s"]), 2)
                    content["rows"].setdefault(way, {})[", ".join(filter(None, [name, row]))] = entry
                    print(f"{way} | {name} {row} | {entry['mean']:.3f} | {entry['cpu_s']:.1f} CPU-s", flush=True)
            content["hardware"] = hardware()
            Path(output).write_text(json.dumps(content, indent=1) + "\n")


def table(output=str(RESULTS)):
    """A row a way, a column a set."""
    rows = json.loads(Path(output).read_text())["rows"]
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print("| |", " | ".join(columns), "|\n|" + " --- |" * (len(columns) + 1))
    for way in (way for way in WAYS if way in rows):
        cells = [f"{rows[way][c]['mean']:.{2 if 'known' in c else 3}f}" if c in rows[way] else "" for c in columns]
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    fire.Fire({"measure": measure, "child": child, "table": table})
