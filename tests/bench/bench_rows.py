"""One table of every timing of operators and networks that was ever measured here, and a picture of the newest ones.

    python tests/bench/bench_rows.py collect        # results/*.json, and what they were in git -> results/rows.csv
    python tests/bench/bench_rows.py draw           # results/rows.csv -> results/rows.png

A row of rows.csv: operator, size, channels, pass, layer, dtype, layout, device, torch, commit, seconds, mib, floor
(seconds on paper, where known: bytes over the bandwidth or products over the rate, whichever takes longer; of a GPU
bytes alone).
Rows that are there stay; `collect` adds those that are new. On a CPU seconds are those of the process, on one thread.
"""

import csv
import json
import re
import subprocess
from collections.abc import Iterator
from math import prod
from pathlib import Path

import fire
from machine import ROOT
from operator_cases import CASES, floor_match_both, floor_modulated_conv3d_both, floor_norm_act_both, floor_warp_both

RESULTS = Path(__file__).parent / "results"
COLUMNS = "operator,size,channels,pass,layer,dtype,layout,device,torch,commit,seconds,mib,floor".split(",")
BOTH = "forward + backward"
CHANNELS = {1: 8, 2: 16, 4: 32, 8: 64}  # of SACB-Net's scales, by the divisor of the size
WAYS = {"features": "features", "GiB": "budget_gib", "steps": "refine_steps"}  # of a table without variants
FLOORS = {  # of bench_gpu.py's operators: scans in a batch, and stages of forward and backward pass
    "warp": (1, floor_warp_both),
    "match": (1, floor_match_both),
    "norm_act": (2, floor_norm_act_both),
    "modulated_conv3d": (2, floor_modulated_conv3d_both),
}
NAMED = {"half": 2, "quarter": 4, "eighth": 8}


def main_rows(found: dict, commit: str) -> Iterator[dict]:
    """Of results/operators_*.json, by bench_operators.py."""
    machine = found["hardware"]
    for case in found["cases"]:
        of_case = {"operator": case["case"], "size": text(case["size"]), "channels": case["channels"]}
        of_case |= {"pass": case["pass"], "device": machine.get("gpu") or machine["cpu"], "torch": machine["torch"]}
        for row in case["rows"]:
            if "skipped" not in row and found.get("scale", 1) == 1:
                words = row["way"].split()
                of_row = {"layer": words[0], "layout": "channels-last" if "cl" in words else "", "dtype": row["dtype"]}
                of_row |= {"seconds": row["seconds"], "mib": row["mib"], "floor": row["floor_seconds"]}
                yield of_case | of_row | {"commit": commit}


def process_rows(found: dict, commit: str, operator: str) -> Iterator[dict]:
    """Of the tables of whole networks, a process a row."""
    rows, machine = (found, {}) if isinstance(found, list) else (found["rows"], found.get("hardware", {}))
    for row in rows:
        given = (f"{what} {row[key]}" for what, key in WAYS.items() if key in row)
        name = row.get("variant") or ", ".join(given)
        size = row.get("size") or found["size"]
        fixed = {"operator": operator, "size": text(size), "channels": 1, "pass": row.get("kind", "forward")}
        fixed |= {"layer": name, "dtype": "float32", "layout": "", "device": machine.get("cpu", "CPU")}
        fixed |= {"torch": machine.get("torch", ""), "commit": commit, "floor": ""}
        yield fixed | {"seconds": row["cpu_s"], "mib": 1024 * (row["peak_gib"] - row.get("base_gib", 0))}


def gpu_rows(found: dict, _: str) -> Iterator[dict]:
    """Of results/gpu_*.json, by bench_gpu.py and its forerunner; its file says which commit."""
    machine, size = found["hardware"], found["size"]
    for part in (found.get("before", {"rows": {}}), found):
        fixed = {"device": machine["gpu"], "torch": machine["torch"], "commit": part.get("commit")}
        for name, row in part["rows"].items():
            if isinstance(row, dict):
                for one in gpu_row(name, row, size, machine["rates"]):
                    yield fixed | {"layout": "channels-last", "mib": "", "floor": ""} | one


def gpu_row(name: str, row: dict, size: list[int], rates: dict) -> Iterator[dict]:
    words, half = name.split(), re.search(r"bfloat16|bf16", name)
    grid = re.search(r"\d+x\d+x\d+", name)
    fixed = {"dtype": "bfloat16" if half else "float32", "layer": "default", "size": grid[0] if grid else text(size)}
    if words[0] in ("pass", "step"):
        what = "forward" if words[0] == "pass" else "training step"
        how = name.replace(fixed["size"], "").replace("bfloat16", "").replace(words[0], "", 1).strip()
        fixed |= {"operator": "sacb_net", "channels": 1, "pass": what, "layer": how or "default"}
        yield fixed | {"seconds": row["ms"] / 1000, "mib": row.get("mib", "")}
    elif words[0] == "conv" and "_" in words[1]:  # the forerunner's
        inputs, _, outputs, *scale = words[1].split("_")
        divisor = NAMED[scale[0]] if scale else 1
        fixed |= {"operator": f"conv3d {inputs} to {outputs}", "size": text([n // divisor for n in size])}
        fixed |= {"layout": "channels-last" if words[2] == "ndhwc" else "", "channels": int(inputs)}
        fixed |= {"layer": " ".join(["cuDNN", *words[3:]]), "dtype": "bfloat16" if half else "float32"}
        for what, key in (("forward", "fwd"), ("backward", "bwd")):
            yield fixed | {"pass": what, "seconds": row[key] / 1000}
    elif words[0] == "conv":
        divisor = int(words[4].strip(",").split("/")[1])
        fixed |= {"operator": " ".join(["conv3d", *words[1:3], words[3].strip(",")])}
        fixed |= {"size": text([n // divisor for n in size]), "channels": int(words[1])}
        for key, ms in row.items():
            layer, _, what = key.partition(" ")
            if layer in ("reference", "triton"):
                yield fixed | {"layer": layer, "pass": "forward" if what == "pass" else what, "seconds": ms / 1000}
    elif words[0] == "op" or "," in name:
        operator = words[1] if words[0] == "op" else words[0].strip(",")
        operator = "modulated_conv3d" if operator == "modulated" else operator
        divisor = int(words[3]) if words[0] == "op" else int(words[1].strip(",").split("/")[1])
        grid = [n // divisor for n in size]
        fixed |= {"operator": operator, "channels": CHANNELS[divisor], "size": text(grid)}
        fixed |= {"dtype": "bfloat16" if half else "float32", "layer": "default"}
        forward = row.get("forward", row.get("fwd", row))
        backward = row.get("backward", row.get("bwd"))
        for number, (what, value) in enumerate((("forward", forward), ("backward", backward))):
            if value is not None:
                ms, floor = value["ms"] if isinstance(value, dict) else value[0], ""
                if operator in FLOORS:
                    batch, floor_of = FLOORS[operator]
                    numbers = batch * floor_of(prod(grid), CHANNELS[divisor])[number].numbers
                    floor = numbers * (2 if half else 4) / (1e9 * rates["copy_gb_s"])
                yield fixed | {"pass": what, "seconds": ms / 1000, "floor": floor}


def text(size: list[int]) -> str:
    return "x".join(map(str, size))


READERS = {
    "operators_*.json": main_rows,
    "gpu_*.json": gpu_rows,
    "sacb_net_*.json": lambda found, commit: process_rows(found, commit, "sacb_net"),
    "residual_aligner_*x*.json": lambda found, commit: process_rows(found, commit, "residual_aligner"),
    "dual_flownet_*x*.json": lambda found, commit: process_rows(found, commit, "dual_flownet"),
    "samconvex_*x*.json": lambda found, commit: process_rows(found, commit, "samconvex"),
}


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout


def versions(path: Path) -> Iterator[tuple[str, str]]:
    """Commit and content of a file, the newest last; "" for what is not committed."""
    name = path.relative_to(ROOT).as_posix()
    past = git("log", "--format=%h", "--abbrev=7", "--", name).split()
    for commit in reversed(past):
        yield commit, git("show", f"{commit}:{name}")
    if not past or git("status", "--porcelain", "--", name):
        yield "", path.read_text()


def key_of(row: dict) -> tuple[str, ...]:
    """A row but for its commit: a file that was committed again with the same row has not measured it again."""
    return tuple(str(row[name]) for name in COLUMNS if name != "commit")


def collect(output: str = str(RESULTS / "rows.csv")) -> None:
    """Add to the table what it does not have.

    Args:
        output: the table.
    """
    path = Path(output)
    rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    known, before = {key_of(row) for row in rows}, len(rows)
    for pattern, reader in READERS.items():
        for file in sorted(RESULTS.glob(pattern)):
            for commit, content in versions(file):
                for row in reader(json.loads(content), commit) if content.strip() else ():
                    rounded = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                    row = {name: str(rounded[name] if rounded[name] is not None else "") for name in COLUMNS}
                    if key_of(row) not in known:
                        known.add(key_of(row))
                        rows.append(row)
    rows.sort(key=lambda row: (row["operator"], row["device"], row["size"], row["pass"]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{path}: {len(rows)} rows, {len(rows) - before} of them new")


def draw(table: str = str(RESULTS / "rows.csv"), output: str = str(RESULTS / "rows.png")) -> None:
    """A line an operator, one panel for CPUs and one for GPUs: seconds of each layer, a cross at the floor.

    Args:
        table: of `collect`.
        output: PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in csv.DictReader(open(table, newline="")) if row["dtype"] == "float32"]
    gpus = [row for row in rows if "NVIDIA" in row["device"]]
    cpus = [row for row in rows if row not in gpus and row["operator"] in {case.name for case in CASES}]
    newest: dict[tuple, dict] = {}
    panels = []
    for title, some in (("one CPU thread", cpus), ("NVIDIA H200", gpus)):
        newest = {(label(row), row["layer"], row["layout"]): row for row in some if some is cpus or shown(row)}
        panels.append((title, list(newest.values())))
    heights = [max(len({label(row) for row in some}), 1) for _, some in panels]
    figure, axes = plt.subplots(2, 1, figsize=(9, 0.19 * sum(heights) + 2), height_ratios=heights)
    for axis, (title, some) in zip(axes, panels):
        names = sorted({label(row) for row in some}, reverse=True)
        for layer in sorted({family(row["layer"]) for row in some}):
            chosen = [row for row in some if family(row["layer"]) == layer]
            places = [names.index(label(row)) for row in chosen]
            axis.plot([1000 * float(row["seconds"]) for row in chosen], places, "o", markersize=4, label=layer)
        floors = [row for row in some if row["floor"]]
        places = [names.index(label(row)) for row in floors]
        axis.plot([1000 * float(row["floor"]) for row in floors], places, "kx", markersize=4, label="floor")
        axis.set_xscale("log")
        axis.set_ylim(-1, len(names))
        axis.set_yticks(range(len(names)), names, fontsize=6)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(f"{title}, float32", fontsize=9, loc="left")
        axis.set_xlabel("milliseconds", fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    count = sum(len(some) for _, some in panels)
    print(f"{output}: {count} rows, {100 * count / len(rows):.0f} % of those known")


def shown(row: dict) -> bool:
    return bool(row["layout"]) and "benchmark" not in row["layer"] and "contiguous" not in row["layer"]


def label(row: dict) -> str:
    return f"{row['operator']}, {row['pass']}, {row['size']}"


def family(layer: str) -> str:
    """A colour of the picture."""
    for name in ("as a CUDA graph", "cuDNN tf32", "cuDNN fp32"):
        if name in layer:
            return name
    return layer


if __name__ == "__main__":
    fire.Fire({"collect": collect, "draw": draw})
