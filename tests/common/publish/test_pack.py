"""Bundles as zips: the same bytes again, downloaded by MONAI from the loopback, run alone, damage noticed."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import PATIENCE
from monai.bundle import download
from monai.bundle.scripts import _get_all_bundles_info

import common
from common import InputError
from common.__main__ import main
from common.publish import pack

ROOT = Path(__file__).resolve().parents[3]
BUNDLES = sorted(path.name for path in (ROOT / "bundles").iterdir() if path.is_dir())
NAME = "sacb_net"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All bundles, packed by the command."""
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["common", "pack", *BUNDLES, "--output", str(folder), "--url", "https://host/tag/"])
        main()
    return folder


@pytest.fixture(scope="module")
def url(dist: Path) -> Iterator[str]:
    """Address of that folder on the loopback."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=dist)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def archive(dist: Path, name: str = NAME) -> Path:
    (path,) = dist.glob(f"{name}_v*.zip")
    return path


def python(*words: object, cwd: Path) -> subprocess.CompletedProcess:
    """Python as after an installation of the dependencies: this repository is nowhere on its path.

    -S leaves out the files in site-packages by which `pip install -e` leads to this repository.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONPATH"] = os.pathsep.join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    line = [sys.executable, "-S", *map(str, words)]
    return subprocess.run(
        line, cwd=cwd, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=PATIENCE
    )


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLES)
def test_contents(dist: Path, name: str) -> None:
    with zipfile.ZipFile(archive(dist, name)) as file:
        names, infos = file.namelist(), file.infolist()
    assert {path.partition("/")[0] for path in names} == {name}, "MONAI takes the top folder for the bundle's name"
    needed = "LICENSE configs/metadata.json configs/inference.json models/model.pt docs/README.md common/run/engines.py"
    needed += f" common/train/presets/oasis.json common/ops/warp/kernel.py {name}/network.py"
    assert {f"{name}/{path}" for path in needed.split()} <= set(names)
    assert {f"{name}/models/{path.name}" for path in (ROOT / "bundles" / name / "models").glob("*.pt")} <= set(names)
    assert not [path for path in names if "__pycache__" in path or path.split("/")[1] in ("eval", "train", "runs")]
    assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)} and names == sorted(names)


def test_same_files_same_bytes(dist: Path, tmp_path: Path) -> None:
    """From a copy elsewhere, with other times and with what runs leave behind."""
    shutil.copytree(ROOT / "bundles" / NAME, tmp_path / NAME, copy_function=shutil.copyfile)
    (tmp_path / NAME / "eval").mkdir(exist_ok=True)
    (tmp_path / NAME / "docs" / ".ipynb_checkpoints").mkdir()
    for left in ("eval/results.csv", "models/model.ts", "models/checkpoint_epoch=3.pt", "docs/.ipynb_checkpoints/a.md"):
        (tmp_path / NAME / left).write_text("left behind")
    path, checksum, _ = pack.pack(str(tmp_path / NAME), output=tmp_path / "again")
    assert path.read_bytes() == archive(dist).read_bytes()
    assert checksum.read_text() == f"{pack.sha256(path)}  {path.name}\n"
    with (tmp_path / NAME / "docs" / "README.md").open("a") as file:
        file.write("\n")
    assert pack.sha256(pack.pack(str(tmp_path / NAME), output=tmp_path / "other")[0]) != pack.sha256(path)


def test_list_is_what_monai_reads(dist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI fetches models/model_info.json of a repository at a tag; here the answer is the file that we wrote."""
    text = (dist / "models" / "model_info.json").read_text()

    class Answer:
        def __init__(self, address: str, **kwargs) -> None:
            assert address.endswith("/owner/name/1.0/models/model_info.json")
            self.text = text

        def raise_for_status(self) -> None:
            pass

    monkeypatch.setattr("monai.bundle.scripts.requests.get", Answer)
    found = _get_all_bundles_info(repo="owner/name", tag="1.0")
    assert sorted(found) == BUNDLES
    for name in BUNDLES:
        path = archive(dist, name)
        (entry,) = found[name].values()
        assert entry == {"name": path.stem, "browser_download_url": f"https://host/tag/{path.name}"}
        assert json.loads(text)[path.stem]["checksum"] == pack.sha256(path)


def broken(kind: str, folder: Path) -> tuple[Path, str]:
    shutil.copytree(ROOT / "bundles" / NAME, folder, copy_function=shutil.copyfile)
    if kind == "weights":
        (folder / "models" / "model.pt").unlink()
        return folder, "model.pt: no such file"
    if kind == "changelog":
        meta = json.loads((folder / "configs" / "metadata.json").read_text())
        (folder / "configs" / "metadata.json").write_text(json.dumps(meta | {"version": "0.9.9"}))
        return folder, "metadata.json: the changelog has no entry for version 0.9.9"
    return folder / "nothing", "nothing: no such bundle"


@pytest.mark.parametrize("kind", ["weights", "changelog", "name"])
def test_pack_refuses(kind: str, tmp_path: Path) -> None:
    given, sentence = broken(kind, tmp_path / NAME)
    with pytest.raises(InputError, match=sentence):
        pack.pack(str(given), output=tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


# ---- damage ---------------------------------------------------------------------------------------------------------


def damaged(dist: Path, folder: Path, kind: str) -> Path:
    path = folder / archive(dist).name
    content = bytearray(archive(dist).read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if kind == "altered" else content[: len(content) // 2])
    shutil.copy(f"{archive(dist)}.sha256", folder)
    return path


@pytest.mark.parametrize("kind", ["truncated", "altered"])
def test_damage_is_noticed(kind: str, dist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By our command in one sentence, and by MONAI's download as well, which stops at the broken zip."""
    path = damaged(dist, tmp_path, kind)
    monkeypatch.setattr(sys, "argv", ["common", "verify", str(path)])
    with pytest.raises(
        SystemExit, match=f"error: {path}: truncated or altered, its SHA-256 is not .*download it again"
    ):
        main()
    with pytest.raises((zipfile.BadZipFile, EOFError)):
        download(name=NAME, url=path.as_uri(), bundle_dir=str(tmp_path / "bundles"), progress=False)


def test_verify(dist: Path, tmp_path: Path) -> None:
    """The file beside the zip, a file named, the digits; and what is wrong with each."""
    path = archive(dist)
    digits = pack.sha256(path)
    assert pack.verify(path) == pack.verify(path, f"{path}.sha256") == pack.verify(path, digits.upper()) == digits
    (tmp_path / "text").write_text("no digits")
    for given, sentence in ((tmp_path / "text", "does not begin with the 64 digits"), ("none", "none: no such file")):
        with pytest.raises(InputError, match=sentence):
            pack.verify(path, str(given))
    with pytest.raises(InputError, match="absent.zip: no such file"):
        pack.verify(tmp_path / "absent.zip")


# ---- the zip alone --------------------------------------------------------------------------------------------------

LOAD = """
import sys, torch, monai.bundle
net = monai.bundle.load({name!r}, bundle_dir="D", workflow_type="inference", args_file={{"bundle_root": "D/{name}"}})
import common
with torch.no_grad():
    print(type(net).__module__, common.__file__, tuple(net(torch.rand(1, 2, 32, 32, 32)).shape))
"""


@pytest.fixture(scope="module")
def downloaded(dist: Path, url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but D, into which `monai.bundle download` has put every bundle."""
    folder = tmp_path_factory.mktemp("empty")
    address = {name: f"{url}/{archive(dist, name).name}" for name in BUNDLES}
    words = "--name", NAME, "--url", address.pop(NAME), "--bundle_dir", "D"
    done = python("-m", "monai.bundle", "download", *words, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, place in address.items():  # the same in this process, for the time it takes to start one
        download(name=name, url=place, bundle_dir=str(folder / "D"), progress=False)
    probe = python("-c", "import common", cwd=folder)
    assert "No module named 'common'" in probe.stderr, "this repository is still in sight"
    return folder


@pytest.mark.slow
def test_downloaded_bundle_registers(downloaded: Path, tmp_path: Path) -> None:
    words = "--config_file", f"D/{NAME}/configs/inference.json", "--bundle_root", f"D/{NAME}", "--spacing", 6
    done = python("-m", "monai.bundle", "run", *words, "--output_dir", tmp_path / "out", cwd=downloaded)
    assert done.returncode == 0 and "1 pair registered" in done.stdout, done.stderr[-3000:]
    assert {"warped.nii.gz", "transform.h5", "report.png"} <= {
        path.name for path in (tmp_path / "out/phantom").iterdir()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", BUNDLES)
def test_downloaded_bundle_loads(downloaded: Path, name: str) -> None:
    """In Python, from another folder than the bundle's: `args_file` is how load takes the bundle's place."""
    done = python("-c", LOAD.format(name=name), cwd=downloaded)
    assert done.returncode == 0, done.stderr[-3000:]
    module, where, size = done.stdout.splitlines()[-1].split(" ", 2)
    assert module == f"{name}.network" and Path(where).is_relative_to(downloaded / "D" / name)
    assert size == "(1, 3, 32, 32, 32)"


def test_another_version_of_common_is_refused(downloaded: Path, tmp_path: Path) -> None:
    """Of two copies of `common` the first one found is taken; a bundle that it does not fit says so and stops."""
    shutil.copytree(downloaded / "D" / NAME, tmp_path / NAME)
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    init = tmp_path / "common" / "__init__.py"
    init.write_text(init.read_text().replace(f'__version__ = "{common.__version__}"', '__version__ = "9.0.0"'))
    words = "--config_file", f"{NAME}/configs/inference.json", "--bundle_root", NAME
    done = python("-m", "monai.bundle", "run", *words, cwd=tmp_path)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    where = f"version 9.0.0 is loaded from {tmp_path / 'common'}"
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: this bundle needs `common` >= ") and last.endswith(f", but {where}")
