"""Dual-FlowNet: time and memory of a training step, the rows of Table 2, what the consistency constraint does.

    python tests/bench/bench_dual_flownet.py cost                      # 80x96x80, 27 classes, a process a variant
    python tests/bench/bench_dual_flownet.py cost --size 40,48,40 --repeats 1
    python tests/bench/bench_dual_flownet.py table2 DATA --gfn GFN.pt --rfn RFN.pt --grfn GRFN.pt --dfn DFN.pt
    python tests/bench/bench_dual_flownet.py raw DATA                  # scans as scanned, the shipped weights
    python tests/bench/bench_dual_flownet.py consistency DATA --grfn GRFN.pt --dfn DFN.pt [--spacing 2.0]

--output writes the rows as JSON, those of weights with their sha256.

"cost" prints CPU seconds (the fastest of the repeats) and peak memory of forward, loss, backward and Adam with random
scans and labels; it ends with an error if the default variant takes more than 10 GiB.

"table2" evaluates the rows whose weights are given on the validation pairs of DATA, by the bundle's evaluate.json, for
the hippocampus with --overlay hippocampus.

"raw" registers the `registration_pairs` of DATA, of different people and of one person twice, by inference.json.

"consistency" registers the validation pairs of DATA both ways with the weights of either mode and prints, in mm inside
the fixed foreground: "inverse", |compose(Phi_Global, Phi_Global^-1)| with the network's own estimate of the inverse
(eq. 9), "fixed point" with 30 updates, and "both ways", |compose(disp of A to B, disp of B to A)|; Dice beside them.
Without --grfn and --dfn both are trained first from the same seed, `--steps` steps each on random training pairs.
"""

import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire
from machine import ROOT, hardware, one_thread, peak_gib

sys.path[:0] = [str(ROOT), str(ROOT / "bundles" / "dual_flownet")]
LIMIT_GIB = 10.0  # what the project allows the default training step at 80x96x80 with 27 classes
LABELS = 125  # that make the 27 classes of the brain
VARIANTS = {
    "GFN": {"mode": "global"},
    "RFN": {"mode": "region"},
    "GRFN": {"mode": "both"},
    "DFN": {},
    "DFN, labels": {},  # with soft Dice of segmentations and warped fine labels in the loss, as in the card's training
    "DFN, recompute": {"recompute": True},
    "DFN, union": {"roi_mode": "union"},
    "DFN, wide": {"widths": (16, 32, 64, 128, 256)},
}


def child(variant, size, repeats, window):
    import torch

    from common.train.engines import keep_memory
    from dual_flownet import DualFlowLoss, DualFlowNet

    keep_memory()  # as train.json does
    torch.set_num_threads(1)
    torch.manual_seed(0)
    finer = [min(label, 27) for label in range(1, LABELS + 1)]
    options = {"dice_weight": 1.0, "label_weight": 1.0, "class_of": finer} if variant.endswith("labels") else {}
    net, loss = DualFlowNet(**VARIANTS[variant]), DualFlowLoss(window=window, **options)
    optimizer = torch.optim.Adam(net.parameters())
    image, label = torch.rand(1, 2, *size), torch.randint(0, 1 + (LABELS if options else 27), (1, 2, *size)).float()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        optimizer.zero_grad()
        loss(net.forward_train(image), image, label).backward()
        optimizer.step()
        times.append(time.process_time() - begin)
    print(json.dumps({"cpu_s": min(times), "peak_gib": peak_gib()}))


def report(rows, output):
    if output:
        Path(output).write_text(json.dumps({"rows": rows, "hardware": hardware()}, indent=1) + "\n")


def cost(size=(80, 96, 80), variants=tuple(VARIANTS), repeats=3, window=9, output=None):
    """Print a line a variant."""
    rows = []
    for variant in [variants] if isinstance(variants, str) else variants:
        call = [sys.executable, __file__, "child", variant, json.dumps(size), str(repeats), str(window)]
        done = subprocess.run(call, env=one_thread(), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        rows.append({"variant": variant, "size": list(size), "window": window} | json.loads(done.stdout))
        print("{variant:15s} {cpu_s:6.2f} CPU-s a step {peak_gib:6.2f} GiB peak".format(**rows[-1]), flush=True)
    report(rows, output)
    default = [row["peak_gib"] for row in rows if row["variant"] == "DFN" and row["size"] == [80, 96, 80]]
    if default and default[0] > LIMIT_GIB:
        raise SystemExit(f"the default training step takes {default[0]:.1f} GiB, more than {LIMIT_GIB} GiB")


def registered(configs, options):
    """Rows of results.csv after a run of the bundle on one thread."""
    bundle = ROOT / "bundles" / "dual_flownet"
    given = {"config_file": [str(bundle / "configs" / f"{name}.json") for name in configs], "bundle_root": bundle}
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "monai.bundle", "run"]
        for key, value in (given | {"surface": False} | options | {"output_dir": folder}).items():
            line += [f"--{key}", str(value)]
        done = subprocess.run(line, cwd=ROOT, env=one_thread(), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        with Path(folder, "results.csv").open(newline="") as file:
            return list(csv.DictReader(file))


def summary(name, pairs, columns):
    """Print and return the row of these pairs: their means, and the Dice of each."""
    row = {k: sum(float(pair[c]) for pair in pairs) / len(pairs) for k, c in columns.items() if c in pairs[0]}
    print(f"{name:5s} {', '.join(f'{key} {value:.4f}' for key, value in row.items())}", flush=True)
    return {"row": name} | row | {"dice_of_pairs": {pair["id"]: float(pair["dice_after"]) for pair in pairs}}


def table2(data, gfn=None, rfn=None, grfn=None, dfn=None, overlay=None, spacing=None, output=None):
    """Print a line a row: means over the pairs."""
    from common.publish.pack import sha256

    columns = {"dice": "dice_after", "dice_coarse": "dice_coarse_after"}
    columns, rows = columns | {"folding_pct": "folding_pct", "sdlogj": "sdlogj"}, []
    for name, weights in (("gfn", gfn), ("rfn", rfn), ("grfn", grfn), ("dfn", dfn)):
        if not weights:
            continue
        configs = ["inference", "evaluate", *filter(None, [overlay]), f"table2_{name}"]
        options = {"dataset_dir": Path(data).resolve(), "weights": Path(weights).resolve()}
        pairs = registered(configs, options | ({"spacing": spacing} if spacing else {}))
        rows.append(summary(name.upper(), pairs, columns) | {"weights": sha256(Path(weights))})
    report(rows, output)


def raw(data, minimum=100, spacing=None, output=None):
    """Print a line for pairs of different people and one for those of one person; labels above `minimum` voxels."""
    from common.publish.pack import sha256
    from common.run.data import dataset_pairs

    columns = {"affine": "dice_before", "dice": "dice_after", "folding_pct": "folding_pct", "sdlogj": "sdlogj"}
    every, people = dataset_pairs(data, kind=None), dataset_pairs(data)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "pairs.csv")
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, every[0])
            writer.writeheader()
            writer.writerows(every)
        options = {"pairs": table, "minimum": minimum, "save": False} | ({"spacing": spacing} if spacing else {})
        found = registered(["inference"], options)
    weights = sha256(ROOT / "bundles" / "dual_flownet" / "models" / "model.pt")
    kinds = {"different people": [], "one person": []}
    for pair, row in zip(every, found, strict=True):
        kinds["different people" if pair in people else "one person"].append(row)
    report([summary(name, rows, columns) | {"weights": weights} for name, rows in kinds.items() if rows], output)


def scans_of(data, spacing):
    """{id: (scan, label map, classes)} on one grid, ids of the training scans, validation pairs."""
    from monai.transforms import Compose

    from common.run.transforms import LoadScansd, ScaleForegroundd
    from common.train.data import list_scans, validation_pairs
    from common.train.labels import ToClassesd, label_table
    from common.train.transforms import ToTrainingGridd

    load = Compose([LoadScansd(["image"], ["label"]), ToTrainingGridd(spacing), ScaleForegroundd(["image"])])
    classes, found, training = ToClassesd(label_table(27, dataset_dir=data)), {}, []
    for part in ("training", "validation"):
        for scan in list_scans(data, part):
            item = load(dict(scan))
            label = item["label"].as_tensor()
            found[scan["id"]] = (item["image"].as_tensor(), label, classes(item)["label"].as_tensor())
            training += [scan["id"]] * (part == "training")
    return found, training, validation_pairs(data)


def trained(mode, scans, training, steps, learning_rate, window):
    """A network of `mode` after `steps` steps from seed 0, the same pairs for every mode."""
    import torch

    from dual_flownet import DualFlowLoss, DualFlowNet

    torch.manual_seed(0)
    net, loss = DualFlowNet(mode=mode), DualFlowLoss(window=window, dice_weight=1.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate)
    for _ in range(steps):
        a, b = (scans[training[n]] for n in torch.randperm(len(training))[:2].tolist())
        image, label = torch.cat([a[0], b[0]])[None], torch.cat([a[2], b[2]])[None]
        optimizer.zero_grad()
        loss(net.forward_train(image), image, label).backward()
        optimizer.step()
    return net


def measure(net, scans, pairs, spacing):
    """Means over the pairs of three errors and the global flow's length in mm, and of Dice."""
    import torch

    from common.fields import inverse_error, invert
    from common.ops import warp
    from common.train.engines import LabelDice

    sums, dice = {"inverse": 0.0, "fixed point": 0.0, "both ways": 0.0, "flow": 0.0}, LabelDice(minimum=12)
    for moving, fixed in pairs:
        (a, label_a, _), (b, label_b, _) = scans[moving], scans[fixed]
        with torch.no_grad():
            result, back = net.register(torch.cat([a, b])[None], inverse=False), net(torch.cat([b, a])[None])
            flow, inside = result.disp_global, b[:1][None] > 0
            for name, error in (
                ("inverse", inverse_error(flow, net.inverse_flow(flow))),
                ("fixed point", inverse_error(flow, invert(flow))),
                ("both ways", inverse_error(back, result.disp)),
                ("flow", flow.norm(dim=1, keepdim=True)),
            ):
                sums[name] += float(error[inside].mean()) * spacing / len(pairs)
            dice(warp(label_a[None], result.disp, "nearest", "zeros"), torch.cat([label_b, label_a])[None])
    return sums | {"dice": float(dice.aggregate())}


def consistency(data, grfn=None, dfn=None, spacing=4.0, steps=60, learning_rate=0.001, window=5, output=None):
    """Print a line a mode."""
    import torch

    from common.publish.pack import sha256
    from common.run.engines import load_weights
    from dual_flownet import DualFlowNet

    torch.set_num_threads(1)
    scans, training, pairs = scans_of(data, spacing)
    rows = []
    for name, mode, weights in (("GRFN", "both", grfn), ("DFN", "both+rcc", dfn)):
        if weights:
            net = load_weights(DualFlowNet(mode=mode), weights)
        else:
            net = trained(mode, scans, training, steps, learning_rate, window)
        row = measure(net.eval(), scans, pairs, spacing)
        errors = ", ".join(f"{key} {row[key]:.4f} mm" for key in ("inverse", "fixed point", "both ways", "flow"))
        print(f"{name:5s} {errors}; Dice {row['dice']:.4f}", flush=True)
        row |= {"weights": sha256(Path(weights)) if weights else None}
        rows.append({"row": name, "spacing_mm": spacing} | row)
    report(rows, output)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "child":
        child(sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
    else:
        fire.Fire({"cost": cost, "table2": table2, "raw": raw, "consistency": consistency})
