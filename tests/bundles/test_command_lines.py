"""Every command line printed in the READMEs, taken from the files and run on tiny scans that bear the names in them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import ROOT, centred, write
from monai.bundle import ConfigParser

from common import mapping, pack, phantom
from common.points import Points, write_points

FILES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "bundles").glob("*/docs/README.md")),
    *sorted((ROOT / "common").glob("*/README.md")),
]
# How a command begins -> why no test runs it.
EXCLUDED = {
    "pip install": "changes the environment; that its extras exist is tested below",
    "python -m pytest": "is what runs this test",
    "bash .ci/run": "makes an environment of its own and runs all tests in it",
    "python tests/bench/": "a measurement of minutes to hours; its results are committed",
    "python -m monai.bundle download": "needs the published file; test_pack.py downloads it from the loopback",
    "python -m common datalist NAME": "stands for nine data sets; test_datalists.py runs each",
    "srun": "needs a SLURM cluster; one node of it is the line with torchrun, which is run",
    "monailabel": "needs MONAI Label; tests/common/label/test_server.py starts it where it is installed",
    "curl": "needs the server; tests/common/label/test_server.py sends the same requests",
    "python -m common deploy": "needs the Deploy SDK; tests/common/deploy runs it where that is installed",
    "antsApplyTransforms": "a program of ANTs; test_mapping.py tests that ANTs reads our transforms",
}
STARTS = ("python", "torchrun", "bash", "srun", "antsApplyTransforms", "pip", "monailabel", "curl")
TRAINING = {"--max_epochs": "1", "--epoch_length": "1", "--val_interval": "1", "--minimum": "0"}
BY_BUNDLE = {"samconvex": {"--sizes": "[16, 12, 12]", "--val_pairs": "1"}}  # of a training
SPACING = {"sacb_net": "4.5", "samconvex": "4.5", "dual_flownet": "9", "residual_aligner": "9"}  # of every run
PEOPLE = "abcdefg"


def lines_of(path: Path) -> Iterator[tuple[str, ...]]:
    """Commands in fences for bash, with variables put in, and in backticks where they are whole."""
    text, variables = path.read_text(), {}
    for fence in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in fence.replace("\\\n", " ").splitlines():
            if assigned := re.fullmatch(r"(\w+)=(\S+)\s*(#.*)?", line):
                variables[assigned[1]] = assigned[2]
                continue
            line = re.sub(r"\$(\w+)", lambda found: variables.get(found[1], found[0]), line)
            yield from commands_of(shlex.split(line, comments=True))
    for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if code.startswith(tuple(f"{start} " for start in STARTS)) and "..." not in code:
            yield from commands_of(shlex.split(code))


def commands_of(words: list[str]) -> Iterator[tuple[str, ...]]:
    """The parts between `&&`."""
    parts: list[list[str]] = [[]]
    for word in words:
        parts.append([]) if word == "&&" else parts[-1].append(word)
    yield from (tuple(part) for part in parts if part)


def excluded(words: tuple[str, ...]) -> str | None:
    return next((begin for begin in EXCLUDED if " ".join(words).startswith(begin)), None)


LINES = [(path.relative_to(ROOT).as_posix(), words) for path in FILES for words in dict.fromkeys(lines_of(path))]
TO_RUN = [(path, words) for path, words in LINES if not excluded(words)]


def test_lines_are_found() -> None:
    """In every file; and whatever is left out is still there."""
    assert len(TO_RUN) > 30 and {path for path, _ in LINES} == {path.relative_to(ROOT).as_posix() for path in FILES}
    assert {excluded(words) for _, words in LINES} - {None} == set(EXCLUDED)
    assert {words[0] for _, words in TO_RUN} <= {"python", "torchrun"}
    programs = {ROOT / word for _, words in LINES for word in words if word.startswith("tests/bench/bench_")}
    assert programs and [path for path in programs if path.suffix == ".py" and not path.is_file()] == []
    unknown = [(path, word) for path, words in TO_RUN for word in words if "$" in word]
    assert unknown == [], "a variable that no line above sets"


def test_extras_that_are_installed_exist() -> None:
    named = {extra for _, words in LINES for word in words for extra in re.findall(r"^\.\[(\w+)\]$", word)}
    section = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2].partition("\n[")[0]
    assert named and named <= set(re.findall(r"^(\w+) =", section, re.MULTILINE))


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, str(Path(__file__).with_name("line_server.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(program, env=environment, text=True, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the lines name, tiny."""
    folder = tmp_path_factory.mktemp("files")
    size, affine = (32, 40, 32), centred((32, 40, 32), np.diag([4.5] * 3))
    for name in ("DATA", "brain_t1_2mm", "hippocampus_mr", "SCANS", "CT_SCANS"):
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
    for name in ("SCANS", "CT_SCANS"):
        for person in PEOPLE[:3]:
            shutil.copy(folder / "DATA" / f"{person}.nii.gz", folder / name)
    for role, person in (("moving", "a"), ("fixed", "b")):
        for name in (role, role[0], {"moving": "t2", "fixed": "t1"}[role]):
            shutil.copy(folder / "DATA" / f"{person}.nii.gz", folder / f"{name}.nii.gz")
        shutil.copy(folder / "DATA" / f"{person}_label.nii.gz", folder / f"{role}_label.nii.gz")
    places = np.array([[10.0, -20, 5], [-30, 12, -8], [4, 4, 4]])
    write_points(Points(places, ["a", "b", "c"]), folder / "fixed_points.csv")
    write_points(Points(places, ["a", "b", "c"]), folder / "moving_points.fcsv")
    turned = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.05, 0.02, -0.04), [6, -4, 3])
    (folder / "out" / "ID").mkdir(parents=True)
    for name in ("out/ID/transform.h5", "a_to_b.h5", "b_to_c.h5", "any_tool.h5"):
        mapping.write_transform(mapping.affine_transform(turned), folder / name)
    pack.pack("sacb_net", output=folder / "dist")
    return folder


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
    for option, value in options.items():
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("path, words", TO_RUN, ids=[f"{path}-{' '.join(words)[-60:]}" for path, words in TO_RUN])
def test_line(path: str, words: tuple[str, ...], files: Path, server, tmp_path: Path, monkeypatch) -> None:
    """It ends well, in a folder of its own with the bundles beside it, as after a clone."""
    folder = tmp_path / "work"
    shutil.copytree(files, folder, copy_function=os.symlink)
    skip = shutil.ignore_patterns("__pycache__", "eval", "train")
    shutil.copytree(ROOT / "bundles", folder / "bundles", copy_function=os.symlink, ignore=skip)
    monkeypatch.chdir(folder)
    given = list(words)
    if "--size" in words:
        given[given.index("--size") + 1] = "16,16,16"
    if "--input_shape" in words:
        given[given.index("--input_shape") + 1] = "[1,2,32,32,32]"
    elif "monai.bundle" in words:
        given = smaller(given)
        if "--weights" in given and not Path(weights := given[given.index("--weights") + 1]).exists():
            network_weights(given, Path(weights))
    if given[0] == "torchrun":
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        line = [sys.executable, "-m", "torch.distributed.run", *given[1:]]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=400)
        code, text = done.returncode, done.stdout + done.stderr
    else:
        log = tmp_path / "log.txt"
        print(json.dumps({"words": given[1:], "cwd": str(folder), "log": str(log)}), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        text = log.read_text()
    assert code == 0, text[-4000:]
    if "--filepath" in given:
        assert Path(given[given.index("--filepath") + 1]).is_file()
        return
    told = {
        "common": "wrote |is as published",
        "train": "Iter: 1/1 -- train_loss: |pairs of correct",
        "": "pairs? registered",
    }
    kind = "common" if "common" in given else "train" if "train.json" in " ".join(given) else ""
    assert re.search(told[kind], text), text[-4000:]


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(ROOT).as_posix() for path in FILES])
def test_python_runs(path: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        exec(compile(code, str(path), "exec"), {})
