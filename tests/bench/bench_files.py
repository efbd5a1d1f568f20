"""Whole commands, from the shell to their last file: CPU and wall seconds, peak memory, and where the time goes.

    python tests/bench/bench_files.py measure DATA1MM DATA2MM --output tests/bench/results/files.json
    python tests/bench/bench_files.py table --write True

DATA1MM holds scans as they come off the scanner, DATA2MM the same aligned at 2 mm; each with a dataset.json. One
thread, one command after the other, each in a process of its own; CPU seconds, so that other work on the machine
matters little. "Registrar" is a pair in a process that has registered one before. Greedy (affine, deformable, warped
scan) and antsRegistrationSyNQuick run on the same files, by a Python that has picsl_greedy and antspyx
(--tools_python; "" leaves them out). Rows of another run in the same file stay, if they are not measured again.
"""

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
BUNDLES = ("sacb_net", "samconvex", "dual_flownet", "residual_aligner")
RESULTS = Path(__file__).parent / "results" / "files.json"
GREEDY = """
from picsl_greedy import Greedy3D
import sys
fixed, moving, out = sys.argv[1:]
g = Greedy3D()
g.execute(f"-i {fixed} {moving} -a -dof 12 -m NMI -ia-image-centers -n 100x50x10 -o {out}/affine.mat -threads 1")
g.execute(f"-i {fixed} {moving} -it {out}/affine.mat -m NCC 4x4x4 -n 100x50x10 -o {out}/warp.nii.gz -threads 1")
g.execute(f"-rf {fixed} -rm {moving} {out}/warped.nii.gz -r {out}/warp.nii.gz {out}/affine.mat -threads 1")
"""
ANTS = """
import sys, ants
fixed, moving, out = sys.argv[1:]
f, m = (ants.image_read(name) for name in (fixed, moving))
found = ants.registration(f, m, "antsRegistrationSyNQuick[s]", outprefix=out + "/")
ants.image_write(found["warpedmovout"], out + "/warped.nii.gz")
"""
REGISTRAR = """
import json, sys, time
from common.run.registrar import Registrar
bundle, fixed, moving, out = sys.argv[1:]
registrar, cpu = Registrar(bundle), []
for n in range(4):
    begin = time.process_time()
    registrar.register(moving, fixed, f"{out}/{n}")
    cpu.append(time.process_time() - begin)
print(json.dumps(cpu))
"""


def run(line, expected=0):
    """CPU seconds, wall seconds and peak GiB of a command with one thread, and its output."""
    with tempfile.TemporaryFile("w+") as output:
        begin = time.time()
        child = subprocess.Popen(
            line, env=one_thread() | {"PYTHONPATH": str(ROOT)}, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        wall = time.time() - begin
        output.seek(0)
        text = output.read()
    if child.returncode != expected:
        raise SystemExit(f"failed: {' '.join(map(str, line))}\n{text[-2000:]}")
    cpu = used.ru_utime + used.ru_stime
    return {"cpu_s": round(cpu, 2), "wall_s": round(wall, 2), "gib": round(used.ru_maxrss / 2**20, 2)}, text


def bundle_line(bundle, out, *options):
    root = ROOT / "bundles" / bundle
    line = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(root / "configs" / "inference.json")]
    return [*line, "--bundle_root", str(root), "--output_dir", str(out), *map(str, options)]


def files_of(data, limit):
    from common.train.data import list_scans, validation_pairs

    scans = {scan["id"]: scan for scan in list_scans(data, "validation")}
    return [(scans[moving], scans[fixed]) for moving, fixed in validation_pairs(data, limit=limit)]


def stages(folder):
    """Mean CPU seconds of each stage of the pairs in a folder of results."""
    reports = [json.loads(path.read_text())["run"]["stages_cpu_s"] for path in Path(folder).glob("*/report.json")]
    return {name: round(statistics.mean(report.get(name, 0.0) for report in reports), 3) for name in reports[0]}


def measure(raw, small, bundles=BUNDLES, cohort=8, tools_python=sys.executable, output=None):
    """All rows, saved after each."""
    kept, rows = tempfile.TemporaryDirectory(), []
    if output and Path(output).exists():
        rows = json.loads(Path(output).read_text())["rows"]
    bundles = (bundles,) if isinstance(bundles, str) else bundles
    place = Path(kept.name)

    def add(name, found, **more):
        row = {"name": name} | found | more | {"measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
        rows[:] = [other for other in rows if other["name"] != name] + [row]
        print(json.dumps(row), flush=True)
        if output:
            Path(output).write_text(json.dumps({"rows": rows, "hardware": hardware()}, indent=1) + "\n")

    python = sys.executable
    for name, line in {
        "import torch": [python, "-c", "import torch"],
        "import monai.bundle": [python, "-c", "import monai.bundle"],
        "python -m common --help": [python, "-m", "common", "--help"],
    }.items():
        add(name, min((run(line)[0] for _ in range(3)), key=lambda row: row["cpu_s"]))
    wrong = ["--moving", "no.nii.gz", "--fixed", "no.nii.gz"]
    add("a wrong path", run(bundle_line(bundles[0], place / "w", *wrong), expected=1)[0])
    (moving, fixed), *_ = files_of(raw, 1)
    pair = ["--moving", moving["image"], "--fixed", fixed["image"]]
    for bundle in bundles:
        out = place / f"{bundle}_1mm"
        found = run(bundle_line(bundle, out, *pair))[0]
        add(f"{bundle}, a pair of 1 mm scans", found, stages_cpu_s=stages(out))
    (folder,) = [path for path in (place / f"{bundles[0]}_1mm").iterdir() if path.is_dir()]
    apply = [python, "-m", "common", "apply"]
    onto = [folder / "transform.h5", place / "label.nii.gz", "--reference", fixed["image"], "--label"]
    add("apply, a label map at 1 mm", run([*apply, moving["label"], *map(str, onto)])[0])
    (place / "points.csv").write_text("x,y,z\n" + "".join(f"{n},{n},{n}\n" for n in range(12)))
    points = [place / "points.csv", folder / "transform.h5", place / "p.csv"]
    add("apply, 12 points", run([*apply, *map(str, points)])[0])
    judge = [python, "-m", "common", "report", moving["image"], fixed["image"], str(folder / "transform.h5")]
    add("report, 1 mm", run([*judge, str(place / "judged")])[0])
    for bundle in bundles:
        root = str(ROOT / "bundles" / bundle)
        warm = [python, "-c", REGISTRAR, root, fixed["image"], moving["image"], str(place / f"warm_{bundle}")]
        cpu = json.loads(run(warm)[1].splitlines()[-1])
        add(f"{bundle}, Registrar, a further 1 mm pair", {"cpu_s": round(statistics.median(cpu[1:]), 2)})
    cohort_rows(add, files_of(small, cohort), place, bundles)
    if tools_python:
        for name, code in (("Greedy", GREEDY), ("antsRegistrationSyNQuick", ANTS)):
            for kind, data in (("1 mm", raw), ("2 mm", small)):
                (moving, fixed), *_ = files_of(data, 1)
                out = place / f"{name}_{kind[0]}mm"
                out.mkdir()
                files = [fixed["image"], moving["image"], str(out)]
                add(f"{name}, a {kind} pair", run([tools_python, "-c", code, *files])[0])


def cohort_rows(add, pairs, place, bundles):
    """A cohort of 2 mm pairs: the difference between all and the first, for each further pair."""
    for bundle in bundles:
        counts = {}
        for number in (1, len(pairs)):
            table = place / f"pairs{number}.csv"
            lines = [f"{m['image']},{f['image']}" for m, f in pairs[:number]]
            table.write_text("\n".join(["moving,fixed", *lines]) + "\n")
            out = place / f"{bundle}_2mm_{number}"
            counts[number] = run(bundle_line(bundle, out, "--pairs", table, "--spacing", 2))[0]
        first, all_of = counts[1], counts[len(pairs)]
        each = {name: round((all_of[name] - first[name]) / (len(pairs) - 1), 2) for name in ("cpu_s", "wall_s")}
        add(f"{bundle}, a 2 mm pair", first, stages_cpu_s=stages(place / f"{bundle}_2mm_1"))
        add(f"{bundle}, a further 2 mm pair of a cohort", each, stages_cpu_s=stages(out))
        again = run(bundle_line(bundle, out, "--pairs", table, "--spacing", 2))[0]
        add(f"{bundle}, a cohort with nothing left to do", again)


JOBS = {  # of a bundle: what the table says, and how the row is named
    "one pair of 1 mm scans": "{}, a pair of 1 mm scans",
    "a further one, `Registrar`": "{}, Registrar, a further 1 mm pair",
    "one pair of 2 mm scans": "{}, a 2 mm pair",
    "a further one of a cohort": "{}, a further 2 mm pair of a cohort",
    "a cohort with nothing left to do": "{}, a cohort with nothing left to do",
}
PEERS = {"one pair of 1 mm scans": "{}, a 1 mm pair", "one pair of 2 mm scans": "{}, a 2 mm pair"}
OTHERS = ("import monai.bundle", "a wrong path", "python -m common --help", "apply, a label map at 1 mm")
OTHERS += ("apply, 12 points", "report, 1 mm")
BEGIN, END = "<!-- made by tests/bench/bench_files.py table -->\n", "<!-- end of the table of files -->"


def table(path=RESULTS, write=False):
    """The rows as two tables in Markdown, CPU seconds; `write` puts them into common/run/README.md."""
    rows = {row["name"]: row for row in json.loads(Path(path).read_text())["rows"]}
    tools = ("Greedy", "antsRegistrationSyNQuick")

    def cell(name):
        return f"{rows[name]['cpu_s']:.1f}" if name in rows else ""

    lines = ["| files to files, CPU-s | " + " | ".join(f"`{name}`" for name in BUNDLES) + " | Greedy | SyNQuick |"]
    lines.append("| --- " * (1 + len(BUNDLES) + len(tools)) + "|")
    for job, name in JOBS.items():
        cells = [cell(name.format(bundle)) for bundle in BUNDLES]
        cells += [cell(PEERS[job].format(tool)) if job in PEERS else "" for tool in tools]
        lines.append(f"| {job} | " + " | ".join(cells) + " |")
    lines += ["", "| other commands | CPU-s | peak GiB |", "| --- | --- | --- |"]
    lines += [f"| {name} | {cell(name)} | {rows[name].get('gib', '')} |" for name in OTHERS if name in rows]
    text = "\n".join(lines) + "\n"
    if not write:
        print(text, end="")
        return
    page = ROOT / "common" / "run" / "README.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(before + BEGIN + text + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    fire.Fire({"measure": measure, "table": table})
