"""Every bundle and three well-known tools on the same validation pairs; the README's table is made of what this writes.

    python tests/bench/bench_methods.py measure DATA             # all methods, or --methods "sacb_net;Greedy"
    python tests/bench/bench_methods.py table --write True       # the table in README.md from the committed results
    python tests/bench/bench_methods.py measure DATA --methods "sacb_net;residual_aligner;dual_flownet" \
        --overlay hippocampus --output tests/bench/results/methods_hippocampus_mr.json       # the cards' other rows

DATA is a folder with dataset.json whose scans share one grid (here: brain T1 at 2 mm, 8 pairs of two people). A method
runs in a process of its own on one thread. Bundles run by their inference.json and evaluate.json, as a user runs them;
CPU seconds are those of the network, the refinement and the forecast (which the first pair pays for), those of a tool
what its call takes. Tools that are not installed keep their row: pip install antspyx picsl_greedy SimpleITK convexAdam.
Dice: mean over labels above 100 voxels; "coarse": over the label groups of labels.json.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import fire
from machine import ROOT, hardware, one_thread, peak_gib

RESULTS = Path(__file__).parent / "results" / "methods_brain_t1_2mm.json"
BEGIN, END = "<!-- made by tests/bench/bench_methods.py table -->\n", "<!-- end of the table -->\n"
MIND = {"features": "mind"}
BUNDLES = {  # name of the row: bundle, options
    "sacb_net": ("sacb_net", {}),
    "sacb_net, 50 steps": ("sacb_net", {"refine_steps": 50}),
    "sacb_net, 50 steps, diffeomorphic": ("sacb_net", {"refine_steps": 50, "diffeomorphic": True}),
    "samconvex": ("samconvex", {}),
    "samconvex, 50 steps": ("samconvex", {"refine_steps": 50}),
    "samconvex, MIND": ("samconvex", MIND),
    "samconvex, MIND, 20 steps": ("samconvex", MIND | {"refine_steps": 20}),
    "dual_flownet": ("dual_flownet", {}),
    "dual_flownet, 2 passes": ("dual_flownet", {"passes": 2}),
    "dual_flownet, 50 steps": ("dual_flownet", {"refine_steps": 50}),
    "residual_aligner": ("residual_aligner", {}),
    "residual_aligner, 50 steps": ("residual_aligner", {"refine_steps": 50}),
}
TOOLS = {"affine start": None, "ANTs SyN": "antspyx", "Greedy": "picsl_greedy", "ConvexAdam": "convexAdam"}
MEASURES = ("dice", "dice_coarse", "folding_pct", "sdlogj")


def cpu_seconds():
    """Of this process and of the programs that it has started."""
    return sum(os.times()[:4])


def checksum(bundle, file="model.pt"):
    """Of a bundle's weights."""
    from common.publish.pack import sha256

    return sha256(ROOT / "bundles" / bundle / "models" / file)


def run_bundle(name, data, overlay):
    """Means over the pairs of what evaluate.json writes, and the CPU seconds of the inferer."""
    from monai.bundle import ConfigParser

    bundle, options = BUNDLES[name]
    folder = ROOT / "bundles" / bundle
    parser = ConfigParser()
    parser.read_config([folder / "configs" / f"{config}.json" for config in ("inference", *overlay, "evaluate")])
    with tempfile.TemporaryDirectory() as output:
        given = {"bundle_root": str(folder), "dataset_dir": data, "output_dir": output, "device": "cpu"}
        parser.update(given | {"surface": False} | options)
        evaluator = parser.get_parsed_content("evaluator")
        inferer, times = evaluator.inferer, []

        def timed(*args, **kwargs):
            begin = cpu_seconds()
            disp = inferer(*args, **kwargs)
            times.append(cpu_seconds() - begin)
            return disp

        evaluator.inferer = timed
        parser.get_parsed_content("run")
        with (Path(output) / "results.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    columns = {measure: f"{measure}_after" if measure.startswith("dice") else measure for measure in MEASURES}
    columns = {"dice_before": "dice_before"} | columns
    means = {key: sum(float(r[c]) for r in rows) / len(rows) for key, c in columns.items() if c in rows[0]}
    file = Path(parser.get_parsed_content("weights")).name  # "" where none are needed
    weights = checksum(bundle, file) if file else None
    found = {"cpu_s": sum(times) / len(times), "pairs": len(rows), "weights": weights}
    return means | found | {"dice_of_pairs": {row["id"]: float(row["dice_after"]) for row in rows}}


def displacement(tool, moving, fixed, folder):
    """(I, J, K, 3) in voxels by a tool, from scans (I, J, K) in [0, 1]."""
    import numpy as np

    if tool == "affine start":
        return np.zeros((*fixed.shape, 3), np.float32)
    if tool == "ANTs SyN":
        import ants

        scans = [ants.from_numpy(scan) for scan in (fixed, moving)]
        found = ants.registration(*scans, "SyNOnly", outprefix=f"{folder}/", random_seed=1)["fwdtransforms"]
        return ants.image_read(next(path for path in found if path.endswith("Warp.nii.gz"))).numpy()
    if tool == "Greedy":
        import SimpleITK
        from picsl_greedy import Greedy3D

        images = [SimpleITK.GetImageFromArray(scan.T.copy()) for scan in (fixed, moving)]
        line = f"-i fixed moving -m NCC 2x2x2 -n 100x50x10 -threads 1 -o {folder}/warp.nii.gz -V 0"
        Greedy3D().execute(line, fixed=images[0], moving=images[1])
        warp = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(f"{folder}/warp.nii.gz"))
        return warp.transpose(2, 1, 0, 3)
    from convexAdam.convex_adam_MIND import convex_adam_pt

    return np.asarray(convex_adam_pt(255 * fixed, 255 * moving))


def run_tool(tool, data):
    """Means over the pairs, measured as a bundle's are."""
    import torch
    from bench_samconvex import load, pairs_of

    from common.ops import warp
    from common.quality.measure import grouped
    from common.quality.metrics import label_overlap, mean_over_labels, regularity
    from common.run.data import label_groups

    groups, rows = label_groups(data), []
    for pair in pairs_of(data):
        (moving, moving_label), (fixed, fixed_label) = map(load, pair)
        with tempfile.TemporaryDirectory() as folder:
            begin = cpu_seconds()
            disp = displacement(tool, moving[0, 0].numpy(), fixed[0, 0].numpy(), folder)
            seconds = cpu_seconds() - begin
        disp = torch.as_tensor(disp.copy()).movedim(-1, 0)[None].float()
        maps = [fixed_label, warp(moving_label, disp, mode="nearest", padding="zeros"), moving_label]
        maps = [x[0, 0].round().long() for x in maps]
        row = {"dice": mean_over_labels(label_overlap(*maps, minimum=100), "dice")}
        if groups is not None:
            row["dice_coarse"] = mean_over_labels(label_overlap(*[grouped(x, groups) for x in maps]), "dice")
        rows.append(row | regularity(disp, fixed[0, 0] > 0) | {"cpu_s": seconds})
    means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    return means | {"pairs": len(rows)} | ({"version": version(TOOLS[tool])} if TOOLS[tool] else {})


def child(name, data, output, *overlay):
    import torch

    torch.set_num_threads(1)
    found = run_tool(name, data) if name in TOOLS else run_bundle(name, data, overlay)
    Path(output).write_text(json.dumps(found | {"peak_gib": peak_gib()}))


def measure(data, methods=None, overlay=None, output=str(RESULTS)):
    """Measure the methods named (separated by ";"), keeping the other rows of `output`; `overlay`: a config's name."""
    content = json.loads(Path(output).read_text()) if Path(output).exists() else {"rows": {}}
    environment = one_thread() | {"ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"}
    for name in methods.split(";") if methods else (*TOOLS, *BUNDLES):
        with tempfile.TemporaryDirectory() as folder:
            line = [sys.executable, __file__, "child", name, str(data), f"{folder}/row.json", *filter(None, [overlay])]
            done = subprocess.run(line, env=environment, capture_output=True, text=True)
            if done.returncode:
                print(f"{name}: not measured: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            row = json.loads(Path(folder, "row.json").read_text())
            row["measured"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
            content["rows"][name] = row
        print(name, json.dumps(row), flush=True)
        content["hardware"] = hardware()
        Path(output).write_text(json.dumps(content, indent=1) + "\n")


def markdown(content):
    """The README's table."""
    lines = ["| method | Dice | coarse | folding % | CPU-s a pair | peak GiB | weights |", "|" + " --- |" * 7]
    for name in (*TOOLS, *BUNDLES):
        if name not in content["rows"]:
            continue
        row = content["rows"][name]
        title = f"{name} {row['version']}" if "version" in row else name
        if name in BUNDLES:
            title = title.replace(name.split(",")[0], f"`{name.split(',')[0]}`", 1)
        numbers = "{dice:.3f} | {dice_coarse:.3f} | {folding_pct:.3f} | {cpu_s:.1f} | {peak_gib:.1f}".format(**row)
        lines.append(f"| {title} | {numbers} | {weights_of(name)} |")
    return "\n".join(lines) + "\n"


def weights_of(name):
    """Size and licence of what a bundle's row ran with."""
    if name in TOOLS or BUNDLES[name][1].get("features") == "mind":
        return "none needed"
    size = (ROOT / "bundles" / BUNDLES[name][0] / "models" / "model.pt").stat().st_size / 1e6
    terms = (ROOT / "bundles" / BUNDLES[name][0] / "docs" / "data_license.txt").read_text()
    return f"{size:.1f} MB, {'CC BY-NC' if 'CC BY-NC' in terms else 'Apache-2.0'}"


def table(write=False):
    """Print the table; `write` puts it between its marks in README.md."""
    text = markdown(json.loads(RESULTS.read_text()))
    print(text, end="")
    if write:
        readme = (ROOT / "README.md").read_text()
        before, rest = readme.split(BEGIN)
        (ROOT / "README.md").write_text(before + BEGIN + text + END + rest.split(END)[1])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if len(sys.argv) > 1 and sys.argv[1] == "child":
        child(*sys.argv[2:])
    else:
        fire.Fire({"measure": measure, "table": table})
