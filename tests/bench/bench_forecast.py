"""The forecast of time and memory beside the real run: bundles with their shipped weights, one thread.

    python tests/bench/bench_forecast.py calibrate --output tests/bench/results/forecast_units.json
    python tests/bench/bench_forecast.py network --output tests/bench/results/forecast.json
    python tests/bench/bench_forecast.py pairs DATA --output tests/bench/results/forecast_pairs.json

`calibrate` measures what a voxel costs: the numbers of "cost" in each inference.json and of forecast.STEP. `pairs` runs
pairs of scans through the bundle's inference, from files to files, and compares what it says beforehand
with its wall seconds and the peak memory of its process. `network` is network and refinement alone, on the phantom:
each row is two processes: one forecasts, as the inferer does, the other runs the pair and is measured from outside: how
much its resident memory grew (Linux only). Both count CPU seconds, so that other jobs on the machine do not matter; the
forecast that users see is in wall seconds. `ratio` is forecast / measured.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire
from machine import ROOT, hardware, one_thread

sys.path.insert(0, str(ROOT))
ROUNDS = 5  # of calibrate
SIZES = ((64, 64, 64), (80, 96, 80), (96, 112, 96))
STEPS = {"sacb_net": (0, 20), "samconvex": (0, 20)}
BUNDLES = ("sacb_net", "samconvex", "dual_flownet", "residual_aligner")


def registration(bundle, steps):
    """The bundle's inferer, as a function of an image and the number of steps."""
    from monai.bundle import ConfigParser

    from common.run.engines import RegistrationInferer

    root = ROOT / "bundles" / bundle
    sys.path.insert(1, str(root))
    parser = ConfigParser()
    parser.read_config(str(root / "configs" / "inference.json"))
    parser["bundle_root"], parser["device"] = str(root), "cpu"
    network = parser.get_parsed_content("network").eval()
    inferer = RegistrationInferer(steps, cost=parser.get_parsed_content("cost"))
    return lambda image, steps=steps: inferer._register(
        image, network, None, None, None, steps=steps, similarity="lncc", quiet=True, args=(), kwargs={}
    )


def memory_gib(line):
    """VmRSS, resident now, or VmHWM, the most so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{line}:")[1].split()[0]) / 2**20


def child(what, bundle, path, steps):
    """One measurement, printed as JSON."""
    import torch

    from common.run import forecast

    torch.set_num_threads(1)
    forecast.time.perf_counter = time.process_time
    image, run = torch.load(path, weights_only=True), registration(bundle, steps)
    with torch.no_grad():
        if what == "forecast":
            refined = {"steps": steps, "run_steps": lambda n: lambda part: run(part, n)}
            begin = time.process_time()
            cost = forecast.measure_cost(lambda part: run(part, 0), image, **refined)
            voxels = image[0, 0].numel()
            row = {"s": voxels * cost.seconds, "gib": voxels * cost.bytes / 2**30}
            row["itself_s"] = time.process_time() - begin
        else:
            run(image[..., :32, :32, :32])
            Path("/proc/self/clear_refs").write_text("5")  # the most so far counts from here
            before, begin = memory_gib("VmRSS"), time.process_time()
            run(image)
            row = {"s": time.process_time() - begin}
            row["gib"] = memory_gib("VmHWM") - before
    print(json.dumps(row))


def calibrate(bundles=BUNDLES, size=(80, 96, 80), output=None):
    """Units and bytes a voxel of every network, and of a step of the refinement by each similarity."""
    import torch
    from bench_sacb_net import phantom_image

    from common.refine import refine
    from common.run import forecast

    torch.set_num_threads(1)
    forecast.time.perf_counter = time.process_time
    rows, cpu, image = [], torch.device("cpu"), phantom_image(size)
    voxels = image[0, 0].numel()

    def unit():
        forecast.unit_seconds.cache_clear()
        return forecast.unit_seconds(cpu)

    def measured(work):
        """The machine's speed changes from second to second: the unit is timed before and after each of ROUNDS."""
        with torch.no_grad():
            _, held = forecast._timed(work, cpu)
            ratios = []
            for _ in range(ROUNDS):
                before, seconds, after = unit(), forecast._seconds(work), unit()
                ratios.append(2 * seconds / voxels / (before + after))
        return {"units": statistics.median(ratios), "spread": ratios, "bytes": held / forecast.HEAP / voxels}

    for bundle in [bundles] if isinstance(bundles, str) else bundles:
        run = registration(bundle, 0)
        rows.append({"of": bundle} | measured(lambda: run(image)))
        print(json.dumps(rows[-1]), flush=True)
        save(rows, output)
    for similarity in forecast.STEP:
        still = torch.zeros(1, 3, *size)
        found = measured(lambda: refine(still, image, 10, similarity=similarity, progress=False))
        found["units"], found["spread"] = found["units"] / 10, [ratio / 10 for ratio in found["spread"]]
        rows.append({"of": similarity} | found)
        print(json.dumps(rows[-1]), flush=True)
        save(rows, output)


def image_file(folder, size):
    return f"{folder}/{'x'.join(map(str, size))}.pt"


def network(sizes=SIZES, bundles=tuple(STEPS), output=None):
    """Every bundle at every size; the table, and its file."""
    import torch
    from bench_sacb_net import phantom_image

    rows, kept = [], tempfile.TemporaryDirectory()
    folder = kept.name
    for size in sizes:
        torch.save(phantom_image(size), image_file(folder, size))
    for bundle in [bundles] if isinstance(bundles, str) else bundles:
        for size in sizes:
            for steps in STEPS[bundle]:
                found = {}
                for what in ("forecast", "measured"):
                    line = [sys.executable, __file__, "child", what, bundle, image_file(folder, size), str(steps)]
                    done = subprocess.run(line, capture_output=True, text=True, check=True)
                    found[what] = json.loads(done.stdout.splitlines()[-1])
                row = {"bundle": bundle, "size": list(size), "refine_steps": steps} | found
                row["ratio"] = {name: found["forecast"][name] / found["measured"][name] for name in ("s", "gib")}
                rows.append(row)
                print(
                    f"{bundle:10s} {'x'.join(map(str, size)):10s} {steps:2d} steps  forecast "
                    f"{found['forecast']['s']:5.1f} s {found['forecast']['gib']:.2f} GiB, measured "
                    f"{found['measured']['s']:5.1f} s {found['measured']['gib']:.2f} GiB, "
                    f"ratio {row['ratio']['s']:.2f} {row['ratio']['gib']:.2f}",
                    flush=True,
                )
                save(rows, output)


def pairs(data, bundle="sacb_net", limit=2, steps=(0, 20), output=None):
    """The first pairs of a dataset.json, file to file."""
    import nibabel

    from common.train.data import list_scans, validation_pairs

    root, rows = ROOT / "bundles" / bundle, []
    scans = {scan["id"]: scan["image"] for scan in list_scans(data, "validation")}
    for moving, fixed in validation_pairs(data, limit=limit):
        for some in steps:
            with tempfile.TemporaryDirectory() as folder:
                line = [sys.executable, "-m", "monai.bundle", "run", "--bundle_root", str(root), "--config_file"]
                line += [str(root / "configs" / "inference.json"), "--moving", scans[moving], "--fixed", scans[fixed]]
                line += ["--refine_steps", str(some), "--output_dir", folder]
                environment = one_thread() | {"PYTHONPATH": str(ROOT)}
                child = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                _, status, used = os.wait4(child.pid, 0)
                if status:
                    raise SystemExit(f"failed: {' '.join(line)}")
                report = json.loads(next(Path(folder).glob("*/report.json")).read_text())
                with open(Path(folder) / "results.csv", newline="") as table:
                    seconds = float(next(csv.DictReader(table))["seconds"])
            told = report["run"]["forecast"]
            row = {"bundle": bundle, "pair": [moving, fixed], "size": list(nibabel.load(scans[fixed]).shape)}
            row |= {"refine_steps": some, "forecast": {"s": told["pair_seconds"], "gib": told["pair_gib"]}}
            row["measured"] = {"s": seconds, "gib": used.ru_maxrss / 2**20}
            row["ratio"] = {name: row["forecast"][name] / row["measured"][name] for name in ("s", "gib")}
            rows.append(row)
            print(json.dumps(row), flush=True)
            save(rows, output)


def save(rows, output):
    """The rows so far, so that a run that is stopped leaves what it has measured."""
    if output:
        Path(output).write_text(json.dumps({"rows": rows, "hardware": hardware()}, indent=1) + "\n")


if __name__ == "__main__":
    fire.Fire({"calibrate": calibrate, "child": child, "network": network, "pairs": pairs})
