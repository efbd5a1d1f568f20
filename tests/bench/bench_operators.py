"""Time and extra memory of every operator: against the plain formulation, MONAI's own block and the floor on paper.

    python tests/bench/bench_operators.py                          # cuda if there is one, else one CPU thread
    python tests/bench/bench_operators.py --cases match,warp --scale 0.5 --repeats 1

"plain" is the operator's reference layer: the unfolded neighbourhood of match, N masked kernels on unfolded patches of
modulated_conv3d, 20 Lloyd steps on all points of k-means, eight gathers of warp. Every row of a case has the same
values; "cl" rows get them stored channels-last, as the network hands them on, the others in torch's default layout.

floor = sum over a case's stages of max(bytes / bandwidth, FLOP / rate), each tensor moved once a stage, with the rates
of a large copy and a large matrix product measured here.

CPU: process CPU seconds, best of the repeats; memory is the peak of a process of its own above what it held with the
inputs built. CUDA: events after warm-up, median; memory is the allocator's peak above the inputs. Before anything is
timed the operator's tests run: no numbers for an operator whose test is red.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fire
import torch
from machine import ROOT, hardware, one_thread, peak_gib
from operator_cases import CASES, Case, Way, floor_seconds
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
BUDGET = {"cpu": 30.0, "cuda": 10.0}  # seconds after which a row is not repeated again
WARM_UP = 3  # on CUDA: compilation, cuDNN's choice of algorithms, the allocator's pool
UNITS = {"seconds": "time", "mib": "memory"}


def main(
    device: str | None = None,
    cases: str | tuple[str, ...] | None = None,
    repeats: int | None = None,
    check: bool = True,
    output: str | None = None,
    scale: float = 1.0,
) -> None:
    """Time the cases, print the table and write it as JSON.

    Args:
        device: "cpu" or "cuda"; by default cuda if there is one.
        cases: names or their first words ("warp" is all three), comma-separated; all by default.
        repeats: of each row; 5 on CPU and 20 on CUDA, fewer for what takes long.
        check: run each operator's tests first and give no numbers where one is red.
        output: JSON file; by default results/operators_DEVICE.json beside this file if all cases ran at full size.
        scale: factor on every axis, for quick tries; asked figures are then not judged.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = cases.split(",") if isinstance(cases, str) else tuple(cases or [case.name for case in CASES])
    found = {name: [case for case in CASES if f"{case.name}_".startswith(f"{name}_")] for name in names}
    if not all(found.values()):
        raise ValueError(f"main() 'cases' must be out of {[case.name for case in CASES]}, got {cases!r}")
    chosen = [case for case in CASES if any(case in some for some in found.values())]
    repeats = repeats or (20 if device == "cuda" else 5)
    ways = {case.name: case.cuda_ways if device == "cuda" else case.cpu_ways for case in chosen}
    bar = tqdm(total=1 + sum(map(len, ways.values())), unit="row", file=sys.stderr)
    tests = run_tests({test for case in chosen for test in case.tests}, bar) if check else {}
    bar.set_postfix_str("rates")
    rates = run_child({"rates": True, "device": device})
    bar.update()
    report = []
    for case in chosen:
        red = [tests[name] for name in case.tests if tests.get(name, "green") != "green"]
        grid, channels = case.cuda if device == "cuda" else case.cpu
        size = [max(round(n * scale), 4) for n in grid]
        entry = {"case": case.name, "size": size, "channels": channels, "pass": case.what, "rows": []}
        for way in ways[case.name]:
            bar.set_postfix_str(f"{case.name} {way.label}")
            if red:
                row = {"skipped": "test is red: " + "; ".join(red)}
            else:
                row = run_child({"case": case.name, "way": way, "size": size, "repeats": repeats, "device": device})
            entry["rows"].append({"way": way.label, "backend": way.backend, "dtype": way.dtype} | row)
            bar.update()
        judge(entry, case, device, rates, scale)
        report.append(entry)
    bar.close()
    machine = hardware(device)
    print(f"{machine.get('gpu') or machine['cpu']}: copy {rates['bytes'] / 1e9:.0f} GB/s, ", end="")
    print(f"float32 product {rates['float32'] / 1e9:.0f} GFLOP/s")
    print_table(report, bool(check))
    if output or (chosen == list(CASES) and scale == 1):
        path = Path(output or RESULTS / f"operators_{device}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {"hardware": machine, "rates": rates, "tests": tests if check else "nothing was checked"}
        path.write_text(json.dumps(result | {"scale": scale, "repeats": repeats, "cases": report}, indent=1) + "\n")


def run_tests(names: set[str], bar: tqdm) -> dict[str, str]:
    """Outcome of each test file: "green", or why not."""
    outcome = {}
    for name in sorted(names):
        bar.set_postfix_str(f"pytest {name}")
        if not (ROOT / name).exists():
            outcome[name] = f"{name} does not exist"
            continue
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name]
        done = subprocess.run(command, cwd=ROOT, env=one_thread(), capture_output=True, text=True)
        failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        red = failed[0] if failed else f"{name}: pytest exit code {done.returncode}"
        outcome[name] = red if done.returncode else "green"
    return outcome


def run_child(job: dict) -> dict:
    """`child` in a process of its own; one that dies becomes a skipped row, so that the others still count."""
    command = [sys.executable, __file__, "child", json.dumps(job)]
    done = subprocess.run(command, env=one_thread(), capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if "rates" in job:
        raise SystemExit(done.stderr)
    if done.returncode < 0:
        reason = f"killed by signal {-done.returncode}, probably for memory"
    return {"skipped": reason[:200]}


def child(job: dict) -> dict:
    """Measure one row, or the machine's rates."""
    torch.set_num_threads(1)
    # Plain products as precisely as ours and as convolutions.
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision
    if "rates" in job:
        return measure_rates(job["device"])
    case = next(case for case in CASES if case.name == job["case"])
    way, (_, channels) = Way(*job["way"]), case.cuda if job["device"] == "cuda" else case.cpu
    torch.manual_seed(0)
    measure = measure_cuda if job["device"] == "cuda" else measure_cpu
    try:
        with torch.device(job["device"]):
            case.make([16, 16, 16], channels, way)()  # what is imported or compiled on first use is not the operator's
            step = case.make(job["size"], channels, way)
        return measure(step, job["repeats"])
    except torch.OutOfMemoryError as error:
        return {"skipped": f"does not fit: {str(error).splitlines()[0][:120]}"}


def measure_cpu(step: Callable[[], None], repeats: int) -> dict:
    reset_peak()
    base, peak, seconds = peak_gib(), 0.0, []
    while len(seconds) < repeats and sum(seconds) < BUDGET["cpu"]:
        begin = time.process_time()
        step()
        seconds.append(time.process_time() - begin)
        peak = peak or peak_gib()  # of the first run: later ones add what the C library has not given back
    return {"seconds": min(seconds), "mib": 1024 * (peak - base), "base_mib": 1024 * base, "runs": len(seconds)}


def reset_peak() -> None:
    """Linux: forget the peak so far, so that what building the inputs took for a moment hides nothing."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def measure_cuda(step: Callable[[], None], repeats: int) -> dict:
    def timed() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    first = timed()
    for _ in range(WARM_UP - 1 if first < BUDGET["cuda"] else 0):
        timed()
    torch.cuda.reset_peak_memory_stats()
    base, seconds = torch.cuda.memory_allocated() / 2**20, []
    while len(seconds) < repeats and sum(seconds) < BUDGET["cuda"]:
        seconds.append(timed())
    extra = torch.cuda.max_memory_allocated() / 2**20 - base
    return {"seconds": statistics.median(seconds), "mib": extra, "base_mib": base, "runs": len(seconds)}


def measure_rates(device: str) -> dict:
    """Bytes a second (read and written) of a large copy, FLOP a second of large matrix products."""
    copied, side = (2**28, 8192) if device == "cuda" else (2**26, 2048)
    measure = measure_cuda if device == "cuda" else measure_cpu
    with torch.device(device):
        source = torch.ones(copied)
        target = torch.empty_like(source)
        rates = {"bytes": 8 * copied / measure(lambda: target.copy_(source), 5)["seconds"]}
        kinds = ("float32", "bfloat16", "float16") if device == "cuda" else ("float32",)
        for kind in kinds:
            a = torch.randn(side, side).to(getattr(torch, kind))
            rates[kind] = 2 * side**3 / measure(lambda a=a: a @ a, 5)["seconds"]
        torch.backends.cuda.matmul.fp32_precision = "ieee"  # sums that no matrix unit can take
        a = torch.randn(side, side)
        rates["vector"] = 2 * side**3 / measure(lambda: a @ a, 5)["seconds"]
    return rates


def judge(entry: dict, case: Case, device: str, rates: dict, scale: float) -> None:
    """Add to each row its floor, its ratios to plain and to MONAI, and what was asked of it."""
    others = {row["backend"]: row for row in entry["rows"] if row["backend"] in ("reference", "monai")}
    for row in entry["rows"]:
        if "skipped" in row:
            continue
        kind = row["dtype"]
        row["floor_seconds"] = floor_seconds(case, entry["size"], entry["channels"], kind, rates)
        if row["backend"] in others:
            continue
        for name, other in others.items():
            if "skipped" not in other:
                row[f"of_{name}"] = {unit: row[unit] / max(other[unit], 1e-9) for unit in UNITS}
        row["asked"] = []
        for ask in case.cuda_asked if device == "cuda" else case.cpu_asked:
            total = row[ask.unit] + (row["base_mib"] if ask.unit == "mib" else 0)
            got = row.get(f"of_{ask.of}", {}).get(ask.unit) if ask.of else total
            met = None if got is None or scale != 1 else bool(got <= ask.limit)
            row["asked"].append({"unit": ask.unit, "of": ask.of, "limit": ask.limit, "measured": got, "met": met})


def print_table(report: list[dict], checked: bool) -> None:
    """One line a row; ratios are time / memory."""
    head = f"{'case':18s}{'way':22s}{'ms':>10s}{'MiB':>8s}{'of plain':>14s}{'of MONAI':>14s}{'floor ms':>10s}  asked"
    print(head + "\n" + "-" * 118)
    for entry in report:
        size = "x".join(map(str, entry["size"]))
        print(f"{entry['case']}: {entry['pass']}, {size}, {entry['channels']} channels")
        for row in entry["rows"]:
            line = f"{'':18s}{row['way']:22s}"
            if "skipped" in row:
                print(line + row["skipped"])
                continue
            line += f"{1000 * row['seconds']:10.1f}{row['mib']:8.0f}"
            for other in ("of_reference", "of_monai"):
                ratio = row.get(other)
                line += f"{ratio['seconds']:7.2f} /{ratio['mib']:5.2f}" if ratio else f"{'':14s}"
            print(f"{line}{1000 * row['floor_seconds']:10.2f}  {', '.join(map(verdict, row.get('asked', [])))}")
    if not checked:
        print("Nothing was checked: no test ran before these figures.")


def verdict(ask: dict) -> str:
    """For example "time 0.13 of plain (asked 0.2: met)"."""
    what = UNITS[ask["unit"]]
    if ask["measured"] is None:
        return f"{what}: nothing to compare with"
    met = {None: "not judged", True: "met", False: "NOT met"}[ask["met"]]
    of = {"reference": "of plain", "monai": "of MONAI", None: "s" if what == "time" else "MiB in all"}[ask["of"]]
    return f"{what} {ask['measured']:.3g} {of} (asked {ask['limit']}: {met})"


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "child":
        print(json.dumps(child(json.loads(sys.argv[2]))))
    else:
        fire.Fire(main)
