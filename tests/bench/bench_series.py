"""A motion in time that is known: ten phases, error a phase, and the time against single registrations.

    python tests/bench/bench_series.py measure DATA [--film phantom] [--ways series,Registrar] [--output FILE.json]
    python tests/bench/bench_series.py table

"phantom": a 4-D file of 64x80x64 voxels of 2.5 mm, a cycle with noise of its own in each phase. "chest": a real CT of
DATA/dev/chest_ct, moved by the same cycle, with noise of 20 HU in each phase; the motion is made, the scan is not.
"series" is `python -m common series FILM OUT --cyclic True`, one process; "mean" the same with --reference mean, whose
maps are composed to go from phase 0 to each; "Registrar" registers the same nine pairs in one process, each alone, all
with the options of the series; "single" is a command of `monai.bundle run` for each of them. Without --film and --ways
all are measured. Error: mean distance in mm from where points are, in the brain, in the body. CPU seconds of everything
from the shell to the last file, one thread.
"""

import functools
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import fire
from machine import ROOT, hardware, one_thread

sys.path.insert(0, str(ROOT))
RESULT, BUNDLE = Path(__file__).parent / "results" / "series.json", ROOT / "bundles" / "samconvex"
COUNT = 10
OPTIONS = {"refine_steps": 20, "prealign": "none", "report": "none", "device": "cpu"}
OWN = {
    "phantom": {"spacing": 2.5},
    "chest": {"spacing": 4.0, "features": "mind", "intensity_range": [-1000, 1000]},
}
WAYS = ("series", "Registrar", "single", "mean")
REGISTRAR = """
import json, sys
from common.run.registrar import Registrar
files, out, options = json.loads(sys.argv[1])
registrar = Registrar("samconvex", **options)
for number, file in enumerate(files[1:], 1):
    registrar.register(file, files[0], f"{out}/{number}")
"""


def phantom_film():
    """Frames (T, I, J, K), their affine, and which voxels are measured."""
    import nibabel as nib
    import numpy as np

    from common import phantom

    size, spacing = (64, 80, 64), OWN["phantom"]["spacing"]
    affine = nib.affines.from_matvec(spacing * np.eye(3), -spacing * (np.array(size) - 1) / 2)
    found = [phantom.sample(size, affine, moment, seed=n) for n, moment in enumerate(phantom.cycle(COUNT))]
    return np.stack([scan for scan, _ in found]), affine, found[0][1] > 0


def chest_film(data):
    """Likewise, of a real scan: at y, phase t shows what the scan has at back_t(y)."""
    import nibabel as nib
    import numpy as np
    from scipy.ndimage import map_coordinates

    from common import phantom
    from common.space import io

    folder = Path(data) / "dev" / "chest_ct"
    (scan, *_), affine = io.read_scan(folder / "images" / "chest_02.nii.gz")
    label = io.read_label(folder / "labels" / "chest_02.nii.gz")[0][0]
    voxels = np.moveaxis(np.indices(scan.shape), 0, -1)
    frames = []
    for number, moment in enumerate(phantom.cycle(COUNT)):
        there = moment.back(nib.affines.apply_affine(affine, voxels))
        there = nib.affines.apply_affine(np.linalg.inv(affine), there)
        moved = map_coordinates(scan, np.moveaxis(there, -1, 0), order=3, mode="nearest")
        frames.append(moved + np.random.default_rng(number).normal(0, 20, scan.shape))
    return np.stack(frames).astype(np.float32), affine, label > 0


def seconds_of(line):
    """CPU seconds of a command and what it started."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(line, cwd=ROOT, env=one_thread() | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def errors(inside, affine, transforms):
    """Mean distance in mm at every 50th voxel inside, a phase; `transforms` are maps of points, LPS mm."""
    import nibabel as nib
    import numpy as np

    from common import phantom
    from common.space import io

    flip = np.diag(io.LPS_FROM_RAS)[:3]
    points = nib.affines.apply_affine(affine, np.argwhere(inside)[::50])
    found = []
    for moment, the_map in zip(phantom.cycle(COUNT), transforms):
        there = points if the_map is None else the_map(points * flip) * flip
        found.append(float(np.linalg.norm(there - moment.truth(points), axis=1).mean()))
    return found


def through(first, the_map, points):
    """From phase 0 to the mean, and from there to another phase."""
    import numpy as np

    from common.space import mapping

    there = mapping.invert_at(first, points)
    return mapping.map_points(the_map, np.where(np.isnan(there), points, there))


def row_of(way, what, film, folder):
    """Seconds of one way, and the error of each phase."""
    from common.space import carry, io, mapping
    from common.space.transform_files import read_transform

    frames, affine, inside = film
    if way == "no registration":
        return {"seconds": 0.0, "errors": errors(inside, affine, [lambda points: points] * COUNT)}
    carry.write_film(frames, affine, 0.4, folder / "film.nii.gz")
    files = [str(folder / f"{number}.nii.gz") for number in range(COUNT)]
    for file, frame in zip(files, frames):
        io.write_scan(frame, affine, file)
    options, out = OPTIONS | OWN[what], str(folder / "out")
    words = [f"--{name}={value}" for name, value in options.items()]
    names = [f"phase_{n:02d}" for n in range(0 if way == "mean" else 1, COUNT)]
    if way == "single":
        front = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(BUNDLE / "configs/inference.json")]
        front += ["--bundle_root", str(BUNDLE), "--fixed", files[0], "--output_dir", out]
        seconds = sum(seconds_of([*front, "--moving", file, *words]) for file in files[1:])
        names = [f"{n}_to_0" for n in range(1, COUNT)]
    elif way == "Registrar":
        seconds = seconds_of([sys.executable, "-c", REGISTRAR, json.dumps([files, out, options])])
        names = [f"{n}/{n}_to_0" for n in range(1, COUNT)]
    else:
        front = [sys.executable, "-m", "common", "series", str(folder / "film.nii.gz"), out, "--method", "samconvex"]
        seconds = seconds_of([*front, "--cyclic=True", *(["--reference=mean"] if way == "mean" else []), *words])
    maps = [read_transform(folder / "out" / name / "transform.h5") for name in names]
    if way == "mean":
        found = [functools.partial(through, maps[0], the_map) for the_map in maps]
    else:
        found = [None, *(functools.partial(mapping.map_points, the_map) for the_map in maps)]
    return {"seconds": seconds, "errors": errors(inside, affine, found)}


def measure(data, film=("phantom", "chest"), ways=WAYS, output=str(RESULT)):
    path = Path(output)
    for what in [film] if isinstance(film, str) else film:
        made = phantom_film() if what == "phantom" else chest_film(data)
        for way in ("no registration", *([ways] if isinstance(ways, str) else ways)):
            with tempfile.TemporaryDirectory() as place:
                row = row_of(way, what, made, Path(place))
            print(what, way, row, flush=True)
            kept = json.loads(path.read_text()) if path.exists() else {}
            told = {"machine": hardware(), "options": OPTIONS | OWN[what], "size": made[0].shape}
            told["rows"] = kept.get(what, {}).get("rows", {}) | {way: row}
            path.write_text(json.dumps(kept | {what: told}, indent=1) + "\n")
    table(output)


def table(result=str(RESULT)):
    """The rows as they stand in common/run/README.md."""
    names = {
        "no registration": "nothing",
        "single": "a command for each",
        "Registrar": "each alone, in one process",
        "series": "`series --cyclic True`",
        "mean": "`series --cyclic True --reference mean`, from phase 0 to each through the mean",
    }
    for what, content in json.loads(Path(result).read_text()).items():
        print(f"| {what}, error in mm of phase | {' | '.join(map(str, range(1, COUNT)))} | CPU-s |")
        print("|" + " --- |" * (COUNT + 1))
        for name, words in names.items():
            if row := content["rows"].get(name):
                cells = [f"{error:.2f}" for error in row["errors"][1:]]
                print(f"| {words} | {' | '.join(cells)} | {row['seconds']:.0f} |")


if __name__ == "__main__":
    fire.Fire({"measure": measure, "table": table})
