"""The Dockerfile, its steps run one after the other in a fresh environment: where it is built there is more to see."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "common"))

from people import SPACING, write_person  # noqa: E402

ELSEWHERE = ("useradd",)  # a step that only root of a container takes


def stages() -> list[list[tuple[str, str]]]:
    """Instruction and words, line by line, of each stage; what stands before the first FROM comes first."""
    lines = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text()).splitlines()
    found: list[list[tuple[str, str]]] = [[]]
    for line in lines:
        if line and not line.startswith("#"):
            name, _, words = line.partition(" ")
            found += [[]] if name == "FROM" else []
            found[-1].append((name, words))
    return found


class Container:
    """A folder in the place of /, a virtual environment in that of the image's Python."""

    def __init__(self, root: Path, python: Path, built: Path | None = None) -> None:
        self.root, self.python, self.built = root, python, built
        self.env = {"PATH": f"{python.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        self.at, self.entry, self.user = Path("/"), [], "root"

    def inside(self, place: str) -> Path:
        return self.root / str(self.at / place).lstrip("/")

    def take(self, name: str, words: str) -> None:
        if name == "ARG":
            key, _, value = words.partition("=")
            self.env.setdefault(key, value)
        elif name == "ENV":
            self.env |= dict(word.split("=", 1) for word in shlex.split(words))
        elif name == "WORKDIR":
            self.at = self.at / words
            self.inside(".").mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            *sources, target = [word for word in shlex.split(words) if not word.startswith("--from")]
            for source in sources:
                path = self.built / source.lstrip("/") if "--from" in words else ROOT / source
                skip = shutil.ignore_patterns("__pycache__", "eval", "train.log")
                place = self.inside(target)
                place = place / path.name if target.endswith("/") else place
                shutil.copytree(path, place, ignore=skip) if path.is_dir() else shutil.copy(path, place)
        elif name == "RUN" and not words.startswith(ELSEWHERE):
            self.run(["bash", "-euc", words])
        elif name in ("ENTRYPOINT", "CMD"):
            self.entry = json.loads(words) if name == "ENTRYPOINT" else self.entry
        elif name == "USER":
            self.user = words

    def run(self, line: list[str]) -> str:
        env = self.env | {"PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}  # 0: none, says pip
        env |= {"HOME": str(self.root / "tmp")}
        done = subprocess.run(line, cwd=self.inside("."), env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def test_nothing_else_is_sent_to_the_builder() -> None:
    """All that is copied is let through by .dockerignore, which leaves out everything else."""
    first, *rest = (ROOT / ".dockerignore").read_text().split()
    let = {line[1:] for line in rest if line.startswith("!")}
    copied = [shlex.split(words) for stage in stages() for name, words in stage if name == "COPY"]
    sources = {word for words in copied if "--from=build" not in words for word in words[:-1]}
    assert first == "*" and let == sources and all((ROOT / name).exists() for name in sources)


@pytest.mark.slow
def test_steps_in_a_fresh_environment(tmp_path: Path) -> None:
    """Build, install, then a pair and a BIDS data set through the entry point, as a user who is not root.

    The packages that the tests have installed stand for those that pip would fetch.
    """
    before, build, final = stages()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    subprocess.run([python, "-m", "pip", "uninstall", "-qy", "setuptools"], check=True)  # that of the tests is newer
    (site / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    builder = Container(tmp_path / "build", python)
    container = Container(tmp_path / "final", python, built=tmp_path / "build")
    for box, steps in ((builder, build), (container, final)):
        (box.root / "tmp").mkdir(parents=True)
        box.env["TORCH"] = version("torch").partition("+")[0]  # as by --build-arg
        for name, words in [*before, *steps]:
            box.take(name, words)
    assert container.user not in ("root", "0") and container.at == Path("/data")
    data = container.inside(".")
    for seed, name in enumerate(("moving", "fixed")):
        write_person(data, name, seed)
    where = container.run([str(python), "-c", "import common; print(common.__file__)"]).strip()
    assert where.startswith(str(site)), "the wheel's, not the repository's"
    assert (site / "common/slicer/MonaiRegister/MonaiRegisterLib/job.py").is_file()
    words = ["--spacing", str(SPACING), "--device", "cpu", "--method", "samconvex", "--features", "mind"]
    assert "plausible" in container.run([*container.entry, "moving.nii.gz", "fixed.nii.gz", "out", *words]).lower()
    assert (data / "out" / "moving_to_fixed" / "transform.h5").is_file()
    anat = data / "raw" / "sub-1" / "anat"
    anat.mkdir(parents=True)
    shutil.copy(data / "moving.nii.gz", anat / "sub-1_T1w.nii.gz")
    container.run([*container.entry, "bids", "raw", "bids", "participant", "--fixed", "fixed.nii.gz", *words])
    assert (data / "bids" / "sub-1" / "anat" / "sub-1_from-T1w_to-fixed_mode-image_xfm.h5").is_file()


@pytest.mark.slow
def test_image_is_built() -> None:
    """Where a container tool runs: the image, and its help as any user."""
    tool = next((t for t in ("docker", "podman") if shutil.which(t) and _answers([t, "info"])), None)
    if tool is None:
        pytest.skip("no container tool runs here; the steps of the Dockerfile are run by the test above")
    subprocess.run([tool, "build", "-q", "-t", "monai-register:test", "."], cwd=ROOT, check=True, timeout=1500)
    line = [tool, "run", "--rm", "--user", "1234", "monai-register:test"]
    assert "monai-register MOVING FIXED OUT" in subprocess.run(line, capture_output=True, text=True, check=True).stdout


def _answers(line: list[str]) -> bool:
    return subprocess.run(line, capture_output=True, timeout=20).returncode == 0
