"""Every command line printed in the READMEs, taken from the files and run on tiny scans that bear the names in them."""

import ast
import functools
import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import ROOT, centred, write
from forks import PATIENCE, python
from monai.bundle import ConfigParser
from printed_lines import lines_of

from common import phantom
from common.publish import pack
from common.space import mapping
from common.space.carry import write_film
from common.space.io import write_label
from common.space.points import Points, write_points
from common.space.transform_files import write_transform
from dual_flownet import DualFlowNet

FILES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "bundles").glob("*/docs/README.md")),
    *sorted((ROOT / "common").rglob("README.md")),
]
# How a command begins -> why no test runs it.
EXCLUDED = {
    "pip install": "changes the environment; that its extras exist is tested below",
    "python -m pytest": "is what runs this test",
    "bash .ci/run": "makes an environment of its own and runs all tests in it",
    "python tests/bench/bench_auto.py": "needs scans of six kinds; its results are committed",
    "python tests/bench/bench_label.py": "needs MONAI Label; its results are committed",
    "python tests/bench/bench_masks.py": "needs two sets of real scans, in folders of their own",
    "python tests/bench/bench_series.py": "registers thirty pairs; its results are committed",
    "python tests/bench/bench_midspace.py": "needs two visits of real people; its results are committed",
    "python tests/bench/bench_guide.py": "needs real scans with labels; its results are committed",
    "python tests/bench/draw_label.py": "needs MONAI Label; its picture is committed",
    "python tests/bench/draw_deploy.py": "needs the Deploy SDK; its picture is committed",
    "python tests/bench/draw_methods.py real": "needs scans that are not here; its picture is committed",
    "python -m common datalist NAME": "stands for nine data sets; test_datalists.py runs each",
    "monai-register": "is tested from a wheel, test_door.py, and of BIDS data, test_bids.py",
    "bash tests/bench/campaign.sh": "trains for minutes on a GPU; that its options exist is tested below",
    "python tests/bench/bench_universal.py measure": "needs scans of several contrasts; its results are committed",
    "python tests/bench/bench_template.py": "runs ANTs for minutes; its results are committed",
    "python tests/bench/bench_files.py measure": "needs raw scans and other tools; its results are committed",
    "python -m common register": "stands for monai-register; tests/common/run/test_door.py runs it",
    "python -m common run": "is monai.bundle run by the same words; tests/cases/test_start.py runs it",
    "python -m common series": "takes a film of its own; tests/common/run/test_phases.py runs it",
    "python -m common review": "needs the folder of a cohort; tests of quality/review.py make one",
    "monailabel": "needs MONAI Label; tests/common/label/test_server.py runs the line where it is installed",
    "git commit": "is made in a repository of its own by tests/common/publish/test_zoo.py",
    "docker": "needs a container tool; tests/test_container.py runs the steps, and builds where one runs",
    "curl": "needs the server; tests/common/label/test_server.py runs the lines against a real one",
    "python -m common deploy": "needs the Deploy SDK; tests/common/deploy/test_pair_app.py runs the line there",
    "antsApplyTransforms": "a program of ANTs; test_mapping.py tests that ANTs reads our transforms",
}
TRAINING = {"--max_epochs": "1", "--epoch_length": "1", "--val_interval": "1", "--minimum": "0"}
BY_BUNDLE = {"samconvex": {"--sizes": "[16, 12, 12]", "--val_pairs": "1"}}  # of a training
SPACING = {"sacb_net": "4.5", "samconvex": "4.5", "dual_flownet": "9", "residual_aligner": "9"}  # of every run
PEOPLE = "abcdefg"


def excluded(words: tuple[str, ...]) -> str | None:
    return next((begin for begin in EXCLUDED if " ".join(words).startswith(begin)), None)


LINES = [(path.relative_to(ROOT).as_posix(), words) for path in FILES for words in dict.fromkeys(lines_of(path))]
MEASURED = [words for _, words in LINES if words[1].startswith("tests/bench/") and not excluded(words)]
TO_RUN = [(path, words) for path, words in LINES if not excluded(words) and words not in MEASURED]
# The measurements take minutes to hours: how each is made small.
SMALL = {
    "bench_forecast.py pairs": {"--limit": "1", "--steps": "(0,)"},
    "bench_forecast.py network": {"--sizes": "((32,32,32),)", "--bundles": "samconvex"},
    "bench_methods.py measure": {"--methods": "affine start;sacb_net", "--output": "rows.json"},
    "bench_verdict.py table": {},
    "bench_methods.py table": {"--write": "False"},
    "bench_sacb_net.py": {"--size": "32,32,32", "--cluster_quality": "False"},
    "bench_operators.py": {"--cases": "kmeans", "--scale": "0.1", "--repeats": "1", "--check": "False"},
    "bench_gpu.py": {
        "--device": "cpu", "--size": "32,32,32", "--parts": "operators", "--seconds": "5", "--output": "gpu.json",
    },
    "bench_rows.py draw": {"--output": "rows.png"},
    "bench_traced.py": {"--size": "16,16,16"},
    "bench_dual_flownet.py consistency": {"--spacing": "9"},
    "bench_dual_flownet.py table2": {"--spacing": "4.5"},
    "bench_dual_flownet.py raw": {"--spacing": "9", "--minimum": "0"},
    "bench_dual_flownet.py cost": {"--size": "16,16,16", "--variants": "GFN"},
    "bench_samconvex.py accuracy": {"--variants": "start;mind", "--output": "rows.json"},
    "bench_samconvex.py levels": {"--output": "rows.json"},
    "bench_samconvex.py size": {"192,160,256": "32,32,32", "--steps": "(0,2)", "--output": "rows.json"},
    "bench_samconvex.py capture": {"--moved": "[['both',10]]", "--draws": "1", "--output": "rows.json"},
    "bench_contrasts.py": {"--ways": "sacb_net", "--spacing": "9"},
    "bench_sliding.py": {"--steps": "2", "--size": "(32,16,16)", "--pairs": "1", "--seeds": "1"},
    "bench_residual_aligner.py": {"--size": "16,16,16", "--variants": "ran0"},
    "draw_shapes.py": {"--size": "[32,32,32]", "--count": "3"},
    "draw_template.py": {"--spacing": "9", "--count": "2", "--steps": "1", "--output": "result.png"},
    "draw_methods.py phantom": {"--spacing": "4.5", "--output": "result.png"},
}


def test_lines_are_found() -> None:
    """In every file; and whatever is left out is still there."""
    assert len(TO_RUN) > 30 and {path for path, _ in LINES} == {path.relative_to(ROOT).as_posix() for path in FILES}
    assert {excluded(words) for _, words in LINES} - {None} == set(EXCLUDED)
    assert {words[0] for _, words in TO_RUN} <= {"python", "torchrun", "srun"}
    programs = {ROOT / word for _, words in LINES for word in words if word.startswith("tests/bench/bench_")}
    assert programs and [path for path in programs if path.suffix == ".py" and not path.is_file()] == []
    of_slurm = re.compile(r"\$(HOST|SLURM_JOB_ID)\b")
    unknown = [(path, word) for path, words in TO_RUN for word in words if "$" in of_slurm.sub("", word)]
    assert unknown == [], "a variable that no line above sets"


def test_extras_that_are_installed_exist() -> None:
    named = {extra for _, words in LINES for word in words for extra in re.findall(r"^\.\[(\w+)\]$", word)}
    section = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2].partition("\n[")[0]
    assert named and named <= set(re.findall(r"^(\w+) =", section, re.MULTILINE))


def test_options_of_the_campaign_exist(tmp_path: Path) -> None:
    """Each training's config files are there and know every option that it gives."""
    line = ["bash", "tests/bench/campaign.sh", "60", "DATA", str(tmp_path)]
    printed = subprocess.run(line, cwd=ROOT, env=os.environ | {"DRY": "1"}, capture_output=True, text=True, check=True)
    trainings = [shlex.split(text) for text in printed.stdout.splitlines() if text.startswith("python3")]
    assert len(trainings) == 4
    for words in trainings:
        given = dict(zip(words[4::2], words[5::2]))
        parser = ConfigParser()
        parser.read_config([ROOT / path for path in ast.literal_eval(given.pop("--config_file"))])
        keys = [key.removeprefix("--") for key in given]  # of a nested one, what it belongs to
        assert keys and [key for key in keys if (key.rpartition("::")[0] or key) not in parser] == []


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the lines name, tiny."""
    folder = tmp_path_factory.mktemp("files")
    size, affine = (32, 40, 32), centred((32, 40, 32), np.diag([4.5] * 3))
    for name in ("DATA", "brain_t1_2mm", "hippocampus_mr", "SCANS", "CT_SCANS", "LABELS"):
        (folder / name).mkdir()
    for seed, person in enumerate(PEOPLE):
        deformation = phantom.Deformation(seed, amplitude=12)
        deformation.matrix, deformation.shift = np.eye(3), np.zeros(3)
        write(folder / "DATA", person, size, affine, seed, deformation)
    cases = [{"id": p, "image": f"{p}.nii.gz", "label": f"{p}_label.nii.gz"} for p in PEOPLE]
    pair = {"moving": PEOPLE[-1], "fixed": PEOPLE[-2], "kind": "inter-subject"}
    content = {"training": cases[:-2], "validation": cases[-2:], "registration_pairs": [pair]}
    (folder / "DATA" / "dataset.json").write_text(json.dumps(content))
    for name in ("brain_t1_2mm", "hippocampus_mr"):
        shutil.copytree(folder / "DATA", folder / name, dirs_exist_ok=True)
    for path in (folder / "hippocampus_mr").glob("*_label.nii.gz"):  # which has two classes
        label = nib.load(path)
        codes = np.asarray(label.dataobj).clip(0, 2).astype(label.get_data_dtype())
        nib.save(nib.Nifti1Image(codes, label.affine), path)
    for name in ("SCANS", "CT_SCANS"):
        for person in PEOPLE[:3]:
            shutil.copy(folder / "DATA" / f"{person}.nii.gz", folder / name)
    for person in PEOPLE[:3]:
        shutil.copy(folder / "DATA" / f"{person}_label.nii.gz", folder / "LABELS" / f"{person}.nii.gz")
    for role, person in (("moving", "a"), ("fixed", "b")):
        for name in (role, role[0], {"moving": "t2", "fixed": "t1"}[role]):
            shutil.copy(folder / "DATA" / f"{person}.nii.gz", folder / f"{name}.nii.gz")
        shutil.copy(folder / "DATA" / f"{person}_label.nii.gz", folder / f"{role}_label.nii.gz")
    shutil.copy(folder / "fixed.nii.gz", folder / "atlas.nii.gz")
    (folder / "pairs.csv").write_text("id,fixed,moving\np1,fixed.nii.gz,moving.nii.gz\np2,moving.nii.gz,fixed.nii.gz\n")
    places = np.array([[10.0, -20, 5], [-30, 12, -8], [4, 4, 4]])
    write_points(Points(places, ["a", "b", "c"]), folder / "fixed_points.csv")
    write_points(Points(places, ["a", "b", "c"]), folder / "moving_points.fcsv")
    for name in ("m", "f"):
        spread = np.random.default_rng(0).uniform(-40, 40, (6, 3))
        write_points(Points(spread, list("abcdef")), folder / f"{name}.csv")
    ball = np.zeros(size, np.uint8)
    ball[14:18, 18:22, 14:18] = 1
    for name in ("tumour", "lesion"):
        write_label(ball, affine, folder / f"{name}.nii.gz")
    scan = nib.load(folder / "moving.nii.gz").get_fdata(dtype=np.float32)
    write_film(np.stack([scan, scan]), affine, 1.0, folder / "film4d.nii.gz")
    turned = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.05, 0.02, -0.04), [6, -4, 3])
    (folder / "out" / "ID").mkdir(parents=True)
    for name in ("out/ID/transform.h5", "a_to_b.h5", "b_to_c.h5", "any_tool.h5"):
        write_transform(mapping.affine_transform(turned), folder / name)
    pack.pack("sacb_net", output=folder / "dist")
    return folder


@pytest.fixture(scope="module")
def published(files: Path) -> Iterator[str]:
    """Address on the loopback of the zip that the lines download."""
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda self, *args: None})
    serve = functools.partial(quiet, directory=files / "dist")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def on_one_node(words: list[str]) -> list[str]:
    """What `srun` starts on each node, as if there were one."""
    swap = {"--nnodes=2": "--nnodes=1", "--nproc_per_node=4": "--nproc_per_node=2"}
    place = {"$HOST:29500": "127.0.0.1:0", "$SLURM_JOB_ID": "7"}
    given = [swap.get(word, word) for word in words]
    for name, value in place.items():
        given = [word.replace(name, value) for word in given]
    assert given[0] == "srun" and all(word in given for word in swap.values())
    return given[1:]


def network_weights(words: list[str], path: Path) -> None:
    """The state of the network that the configs of a line describe, where it starts from weights of the reader's."""
    value = words[words.index("--config_file") + 1]
    parser = ConfigParser()
    parser.read_config(re.findall(r"[\w./]+\.json", value))
    parser["bundle_root"] = words[words.index("--bundle_root") + 1]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(parser.get_parsed_content("network_def").state_dict(), path)


def smaller(words: list[str]) -> list[str]:
    """The same run on a coarse grid and, if it is a training, for one step."""
    text = " ".join(words)
    name = re.search(r"bundles/(\w+)/configs", text)[1]
    options = {"--spacing": SPACING.get(name, "9")}
    if "train.json" in text:
        options |= TRAINING | BY_BUNDLE.get(name, {})
    elif "--dataset_dir" in words:
        options |= {"--minimum": "0"}
    if "--refine_steps" in words:
        options |= {"--refine_steps": "2"}
    return with_options(words, options)


def with_options(words: list[str], options: dict[str, str]) -> list[str]:
    for option, value in options.items():
        if option in words:
            words[words.index(option) + option.startswith("--")] = value
        else:
            words += [option, value]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("words", dict.fromkeys(MEASURED), ids=lambda words: "-".join(words[1:3]).replace("/", "."))
def test_measurement(words: tuple[str, ...], files: Path, tmp_path: Path) -> None:
    """Small, on the tiny scans, in a folder of its own; it prints numbers."""
    folder = tmp_path / "work"
    shutil.copytree(files, folder, copy_function=os.symlink)
    for mode, name in {"global": "GFN", "region": "RFN", "both": "GRFN", "both+rcc": "DFN"}.items():
        torch.save(DualFlowNet(mode=mode).state_dict(), folder / f"{name}.pt")
    name = Path(words[1]).name
    key = next(key for key in (" ".join([name, *words[2:3]]), name) if key in SMALL)
    done = python(ROOT / words[1], *with_options(list(words[2:]), SMALL[key]), cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"\d\.\d+|\d %", done.stdout) and not re.search("nan|not measured", done.stdout), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path, words", TO_RUN, ids=[f"{path}-{' '.join(words)[-60:]}" for path, words in TO_RUN])
def test_line(path: str, words: tuple[str, ...], files: Path, published, tmp_path: Path, monkeypatch) -> None:
    """It ends well, in a folder of its own with the bundles beside it, as after a clone."""
    folder = tmp_path / "work"
    shutil.copytree(files, folder, copy_function=os.symlink)
    skip = shutil.ignore_patterns("__pycache__", "eval", "train")
    shutil.copytree(ROOT / "bundles", folder / "bundles", copy_function=os.symlink, ignore=skip)
    monkeypatch.chdir(folder)
    given = on_one_node(list(words)) if words[0] == "srun" else list(words)
    if "download" in given:
        given = [word.replace("https://HOST/TAG", published) for word in given]
    elif "template" in words[3:4]:
        given = with_options(given, {"--spacing": "9", "--rounds": "1"})
    elif "--size" in words:
        given[given.index("--size") + 1] = "16,16,16"
    elif "--input_shape" in words:
        given[given.index("--input_shape") + 1] = "[1,2,32,32,32]"
    elif "monai.bundle" in words:
        given = smaller(given)
        if "--weights" in given and not Path(weights := given[given.index("--weights") + 1]).exists():
            network_weights(given, Path(weights))
    if given[0] == "torchrun":
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        line = [sys.executable, "-m", "torch.distributed.run", *given[1:]]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    else:
        done = python(*given[1:], cwd=folder)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-4000:]
    if "--filepath" in given:
        assert Path(given[given.index("--filepath") + 1]).is_file()
        return
    if "download" in given:
        assert (folder / "D" / "sacb_net" / "models" / "model.pt").is_file()
        return
    told = {
        "common": "wrote |is as published|Its options, and their defaults",
        "train": r"epoch \d+ of \d+: loss ",
        "": "pairs? registered",
    }
    kind = "common" if "common" in given else "train" if "train.json" in " ".join(given) else ""
    assert re.search(told[kind], text), text[-4000:]


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(ROOT).as_posix() for path in FILES])
def test_python_runs(path: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        exec(compile(code, str(path), "exec"), {})
