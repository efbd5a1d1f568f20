"""A motion in time that is known: ten phases of the phantom, error a phase, and the time against single registrations.

    python tests/bench/bench_series.py measure [--output FILE.json]
    python tests/bench/bench_series.py table

The phases are a 4-D file of 64x80x64 voxels of 2.5 mm, a cycle with noise of its own in each phase. "series" is
`python -m common series FILM OUT --cyclic`, one process; "mean" the same with --reference mean, whose maps are composed
to go from phase 0 to each; "single" are nine commands of `monai.bundle run`, "Registrar" the same nine in one process,
all with the options of the series. Error: mean distance in mm from where the phantom's points are, in the brain. CPU
seconds of everything from the shell to the last file, one thread.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import fire
from machine import ROOT, hardware, one_thread

sys.path.insert(0, str(ROOT))
RESULT = Path(__file__).parent / "results" / "series.json"
COUNT, SPACING, SIZE = 10, 2.5, (64, 80, 64)
OPTIONS = {"refine_steps": 20, "prealign": "none", "report": "none", "spacing": SPACING, "device": "cpu"}
REGISTRAR = """
import json, sys
from common.run.registrar import Registrar
files, out, options = json.loads(sys.argv[1])
registrar = Registrar("samconvex", **options)
for number, file in enumerate(files[1:], 1):
    registrar.register(file, files[0], f"{out}/{number}")
"""


def write_film(folder):
    """film.nii.gz in `folder`, and its phases in `phases/`; returns their files."""
    import nibabel as nib
    import numpy as np

    from common import phantom
    from common.space import carry, io

    affine = nib.affines.from_matvec(SPACING * np.eye(3), -SPACING * (np.array(SIZE) - 1) / 2)
    moments = enumerate(phantom.cycle(COUNT))
    frames = np.stack([phantom.sample(SIZE, affine, moment, seed=n)[0] for n, moment in moments])
    (folder / "phases").mkdir()
    carry.write_film(frames, affine, 0.4, folder / "film.nii.gz")
    files = [folder / "phases" / f"{number}.nii.gz" for number in range(COUNT)]
    for file, frame in zip(files, frames):
        io.write_scan(frame, affine, file)
    return [str(file) for file in files]


def seconds_of(line):
    """CPU seconds of a command and what it started."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(line, cwd=ROOT, env=one_thread() | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def errors(transforms):
    """Mean distance in mm at every 50th voxel of the brain, a phase; `transforms` are maps of points, LPS mm."""
    import numpy as np

    from common import phantom
    from common.space import io

    flip = np.diag(io.LPS_FROM_RAS)[:3]
    voxels = np.stack(np.meshgrid(*[np.arange(n) for n in SIZE], indexing="ij"), -1).reshape(-1, 3)
    points = SPACING * (voxels - (np.array(SIZE) - 1) / 2)
    points = points[phantom.anatomy(points)[1] > 0][::50]
    found = []
    for moment, the_map in zip(phantom.cycle(COUNT), transforms):
        there = points if the_map is None else the_map(points * flip) * flip
        found.append(float(np.linalg.norm(there - moment.truth(points), axis=1).mean()))
    return found


def measure(output=str(RESULT)):
    import functools

    import numpy as np

    from common.space import mapping
    from common.space.transform_files import read_transform

    def read(path):
        return functools.partial(mapping.map_points, read_transform(path))

    def motion(points):
        return points

    rows = {"no registration": {"seconds": 0.0, "errors": errors([motion] * COUNT)}}
    words = [f"--{name}={value}" for name, value in OPTIONS.items()]
    bundle = ["--config_file", "bundles/samconvex/configs/inference.json", "--bundle_root", "bundles/samconvex"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = write_film(folder)
        front = [sys.executable, "-m", "common", "series", str(folder / "film.nii.gz")]
        words_of_series = ["--method", "samconvex", "--cyclic", *words]
        seconds = seconds_of([*front, str(folder / "series"), *words_of_series])
        names = [folder / "series" / f"phase_{n:02d}" / "transform.h5" for n in range(1, COUNT)]
        rows["series"] = {"seconds": seconds, "errors": errors([None, *map(read, names)])}
        print(rows["series"], flush=True)
        pairs = [files[1:], [str(folder / "registrar" / str(n)) for n in range(1, COUNT)]]
        line = [sys.executable, "-c", REGISTRAR, json.dumps([files, str(folder / "registrar"), OPTIONS])]
        seconds = seconds_of(line)
        names = [Path(out) / f"{n}_to_0" / "transform.h5" for n, out in enumerate(pairs[1], 1)]
        rows["Registrar"] = {"seconds": seconds, "errors": errors([None, *map(read, names)])}
        print(rows["Registrar"], flush=True)
        seconds = 0.0
        for number, file in enumerate(files[1:], 1):
            pair = ["--moving", file, "--fixed", files[0], "--output_dir", str(folder / "single" / str(number))]
            seconds += seconds_of([sys.executable, "-m", "monai.bundle", "run", *bundle, *pair, *words])
        names = [folder / "single" / str(n) / f"{n}_to_0" / "transform.h5" for n in range(1, COUNT)]
        rows["single"] = {"seconds": seconds, "errors": errors([None, *map(read, names)])}
        print(rows["single"], flush=True)
        seconds = seconds_of([*front, str(folder / "mean"), "--reference", "mean", *words_of_series])
        maps = [read_transform(folder / "mean" / f"phase_{n:02d}" / "transform.h5") for n in range(COUNT)]

        def through_the_mean(the_map, points):
            there = mapping.invert_at(maps[0], points)
            return mapping.map_points(the_map, np.where(np.isnan(there), points, there))

        composed = [functools.partial(through_the_mean, the_map) for the_map in maps]
        rows["mean"] = {"seconds": seconds, "errors": errors(composed)}
        print(rows["mean"], flush=True)
    told = {"machine": hardware(), "options": OPTIONS, "size": SIZE, "rows": rows}
    Path(output).write_text(json.dumps(told, indent=1) + "\n")
    table(output)


def table(result=str(RESULT)):
    """The rows as they stand in common/run/README.md."""
    rows = json.loads(Path(result).read_text())["rows"]
    names = {
        "no registration": "nothing",
        "single": "nine commands, a pair each",
        "Registrar": "the same in one process (`Registrar`)",
        "series": "`series --cyclic`",
        "mean": "`series --cyclic --reference mean`, from phase 0 to each through the mean",
    }
    print(f"| error in mm of phase | {' | '.join(map(str, range(1, COUNT)))} | CPU-s |\n|" + " --- |" * (COUNT + 1))
    for name, words in names.items():
        cells = [f"{error:.2f}" for error in rows[name]["errors"][1:]]
        print(f"| {words} | {' | '.join(cells)} | {rows[name]['seconds']:.0f} |")


if __name__ == "__main__":
    fire.Fire({"measure": measure, "table": table})
