"""Templates of `python -m common template` and of ANTs on real brains: how sharp, and what labels agree through them.

    python tests/bench/bench_template.py measure DATA WORK        # all steps; WORK keeps what is done
    python tests/bench/bench_template.py build DATA WORK          # our template of the training scans
    python tests/bench/bench_template.py ants DATA WORK           # ants.build_template of the same; needs antspyx
    python tests/bench/bench_template.py judge DATA WORK          # both, and the affine mean, on the validation pairs
    python tests/bench/bench_template.py resume DATA              # killed in the middle and started again

DATA is a folder with dataset.json whose scans share one space and grid (brain T1 at 2 mm): so nothing is aligned first.
CPU seconds are those of building, without imports, on one thread. Sharpness is the mean slope |grad| a voxel, of the
template over its 99.5th percentile, 3 voxels and more inside its brain. Dice through the template: the people of the
validation pairs are registered to it, their labels are brought onto it, and those of a pair are compared there: mean
over labels above 100 voxels, then over pairs. That is measured by two methods of registration, so that neither template
is judged by the method alone that made it.
"""

import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire
from machine import ROOT, hardware, one_thread

RESULTS = Path(__file__).parent / "results" / "template_brain_t1_2mm.json"
METHOD = {"method": "samconvex", "features": "mind", "refine_steps": 20, "prealign": "none", "device": "cpu"}


def cpu_seconds():
    """Of this process and of the programs that it has started."""
    return sum(os.times()[:4])


def keep(output, **parts):
    """Put parts of the results into their file."""
    content = json.loads(Path(output).read_text()) if Path(output).exists() else {}
    content |= parts | {"hardware": hardware()}
    Path(output).write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(parts), flush=True)


def dataset(data):
    return json.loads((Path(data) / "dataset.json").read_text())


def scans_of(data, limit):
    """The first training scans."""
    return [Path(data) / case["image"] for case in dataset(data)["training"][:limit]]


def table(data, path, limit):
    """A CSV of the training scans with their label maps."""
    cases = dataset(data)["training"][:limit]
    lines = [f"{c['id']},{Path(data).absolute() / c['image']},{Path(data).absolute() / c['label']}" for c in cases]
    Path(path).write_text("\n".join(["id,moving,moving_label", *lines]) + "\n")
    return path


def build(data, work, limit=19, rounds=2, output=str(RESULTS)):
    """Our template; a run that was stopped goes on, and then its CPU seconds are those of the rest."""
    import torch

    from common.run.template import make_template

    torch.set_num_threads(1)
    Path(work).mkdir(parents=True, exist_ok=True)
    begin = cpu_seconds()
    folder = make_template(table(data, Path(work) / "scans.csv", limit), Path(work) / "ours", rounds=rounds, **METHOD)
    seconds = cpu_seconds() - begin
    told = json.loads((folder / "template.json").read_text())
    facts = {"scans": limit, "rounds": rounds, "cpu_s": seconds, "method": METHOD, "of_rounds": told["rounds"]}
    keep(output, ours=facts)


def ants(data, work, limit=19, iterations=2, output=str(RESULTS)):
    """ants.build_template with its own defaults, but for the number of iterations; from the mean, as it does."""
    import ants as tool

    images = [tool.image_read(str(path)) for path in scans_of(data, limit)]
    begin = cpu_seconds()
    found = tool.build_template(image_list=images, iterations=iterations, random_seed=1)
    seconds = cpu_seconds() - begin
    tool.image_write(found, str(Path(work) / "ants.nii.gz"))
    keep(output, ants={"scans": limit, "iterations": iterations, "cpu_s": seconds, "version": tool.__version__})


def sharpness(path):
    """Mean slope a voxel, well inside the brain."""
    import nibabel as nib
    import numpy as np
    from scipy.ndimage import binary_erosion, binary_fill_holes

    from common.space.average import steepness

    scan = np.asarray(nib.load(path).dataobj, np.float32)
    top = np.percentile(scan[scan > 0.02 * scan.max()], 99.5)
    inside = binary_erosion(binary_fill_holes(scan > 0.1 * top), iterations=3)
    return float(steepness(np.clip(scan / top, 0, 1))[inside].mean())


def by_samconvex():
    """A function of a moving scan, its label map and a fixed scan: the labels on the fixed grid."""
    from common.run.registrar import Registrar

    options = {name: value for name, value in METHOD.items() if name != "method"}
    registrar = Registrar(METHOD["method"], surface=False, **options)
    return lambda scan, label, fixed: registrar.register(scan, fixed, moving_label=label).warped_label


def by_syn():
    """The same by ANTs, SyN without an affine part."""
    import ants as tool

    def register(scan, label, fixed):
        fixed, moving = (tool.image_read(str(path)) for path in (fixed, scan))
        found = tool.registration(fixed, moving, "SyNOnly", random_seed=1)["fwdtransforms"]
        found = [path for path in found if path.endswith("Warp.nii.gz")]
        labels = tool.image_read(str(label))
        return tool.apply_transforms(fixed, labels, found, interpolator="nearestNeighbor").numpy()

    return register


def judge(data, work, methods="samconvex;SyN", output=str(RESULTS)):
    """Sharpness of each template, and Dice through it of the validation pairs."""
    import numpy as np
    import torch

    from common.quality.metrics import label_overlap, mean_over_labels

    torch.set_num_threads(1)
    work = Path(work)
    places = {"affine mean": "ours/rounds/0/mean.nii.gz", "ours": "ours/template.nii.gz"}
    places |= {"ours, not sharpened": "ours/mean.nii.gz", "ANTs": "ants.nii.gz"}
    templates = {name: work / place for name, place in places.items() if (work / place).is_file()}
    sharp = {name: sharpness(path) for name, path in templates.items()}
    sharp["the scans, each alone"] = float(np.mean([sharpness(path) for path in scans_of(data, 19)]))
    keep(output, sharpness=sharp)
    content = dataset(data)
    cases = {case["id"]: case for part in ("training", "validation") for case in content[part]}
    pairs = [(p["moving"], p["fixed"]) for p in content["registration_pairs"] if p["kind"] == "inter-subject"]
    found = {}
    for method in methods.split(";"):
        register = {"samconvex": by_samconvex, "SyN": by_syn}[method]()
        for name, path in templates.items():
            if name == "ours, not sharpened":
                continue
            labels = {}
            for person in sorted({person for pair in pairs for person in pair}):
                files = (Path(data) / cases[person][kind] for kind in ("image", "label"))
                labels[person] = torch.from_numpy(np.rint(register(*files, path)).astype(np.int64))
            scores = [label_overlap(labels[b], labels[a], minimum=100) for a, b in pairs]
            scores = [mean_over_labels(score, "dice") for score in scores]
            found.setdefault(method, {})[name] = {"dice": float(np.mean(scores)), "pairs": len(scores)}
            keep(output, dice_through_the_template=found)


def content(path):
    """The bytes of a file; of a compressed one, whose header holds the hour, what it was made of."""
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def resume(data, limit=4, output=str(RESULTS)):
    """The command on a few scans: once through, and once killed (SIGKILL) after half of the registrations."""
    with tempfile.TemporaryDirectory() as folder:
        scans = table(data, Path(folder) / "scans.csv", limit)
        words = ["--rounds=1", "--method=samconvex", "--features=mind", "--prealign=none", "--device=cpu"]
        line = [sys.executable, "-m", "common", "template", str(scans)]
        place, kwargs = Path(folder), {"cwd": ROOT, "env": one_thread() | {"PYTHONPATH": str(ROOT)}}
        subprocess.run([*line, f"{place}/once", *words], check=True, **kwargs)
        process = subprocess.Popen([*line, f"{place}/twice", *words], **kwargs)
        while len(list(place.glob("twice/rounds/1/*.h5"))) < limit // 2 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        left = len(list(place.glob("twice/rounds/1/*.h5")))
        subprocess.run([*line, f"{place}/twice", *words], check=True, **kwargs)
        names = ["template.nii.gz", "mean.nii.gz", "template_label.nii.gz"]
        names += [f"{case['id']}/transform.h5" for case in dataset(data)["training"][:limit]]
        same = [len({content(place / run / name) for run in ("once", "twice")}) == 1 for name in names]
    facts = {"killed": killed, "registered_when_killed": left, "scans": limit, "files": len(same), "same": sum(same)}
    keep(output, resumed=facts)


def measure(data, work, limit=19, rounds=2, iterations=2, output=str(RESULTS)):
    """Everything, each step in a process of its own."""
    environment = one_thread() | {"ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1", "PYTHONPATH": str(ROOT)}
    where, common = [str(data), str(work)], [f"--output={output}"]
    steps = [["build", *where, f"--limit={limit}", f"--rounds={rounds}"], ["judge", *where], ["resume", str(data)]]
    steps.insert(1, ["ants", *where, f"--limit={limit}", f"--iterations={iterations}"])
    for step in steps:
        subprocess.run([sys.executable, __file__, *step, *common], check=True, env=environment)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    fire.Fire({"measure": measure, "build": build, "ants": ants, "judge": judge, "resume": resume})
