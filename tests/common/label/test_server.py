"""The app in MONAI Label: called directly, and as a real server driven by the host's own client."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
from forks import PATIENCE
from people import SPACING, label_of, write_person
from printed_lines import lines_of, the_line

from common.label.folder import write_app
from common.run.cli import bundle_folder
from common.run.registrar import Registrar
from common.space import io, mapping
from common.space.transform_files import read_transform

pytest.importorskip("monailabel", reason="MONAI Label is not installed; common/label/README.md says how")
pytestmark = pytest.mark.slow
needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
README = Path(__file__).resolve().parents[3] / "common" / "label" / "README.md"
SETTLE = 300  # s that a server may take to remove the files of a request that it has answered

from monailabel.client import MONAILabelClient  # noqa: E402

from common.label.app import TEMPORARY_FOLDER, RegistrationApp  # noqa: E402


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An atlas with labels, three patients without, a single slice, and a label without its scan."""
    folder = tmp_path_factory.mktemp("studies")
    for seed, name in enumerate(("atlas", "patient", "p2", "p3")):
        write_person(folder, name, seed)
        if seed:
            label_of(folder, name).rename(folder.parent / f"{folder.name}_{name}_truth.nii.gz")
    nib.save(nib.Nifti1Image(np.ones((20, 20), np.float32), np.eye(4)), folder / "flat.nii.gz")
    io.write_label(np.ones((9, 9, 9)), np.eye(4), label_of(folder, "ghost"))
    return folder


@pytest.fixture(scope="module")
def app_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_app(str(tmp_path_factory.mktemp("app") / "new"), ["sacb_net"], options={"spacing": SPACING})


@pytest.fixture(scope="module")
def app(app_folder: Path, studies: Path) -> RegistrationApp:
    return RegistrationApp(str(app_folder), str(studies), {})


@pytest.fixture(scope="module")
def server(app_folder: Path, studies: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MONAILabelClient]:
    """A server on this machine only, with its temporary files in a folder of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = tmp_path_factory.mktemp("temporary")
    programs = Path(sys.executable).parent  # `monailabel` is a script that starts the `python` of the PATH
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    names = {"monailabel": programs / "monailabel", "APP": app_folder, "STUDIES": studies}
    line = [str(names.get(word, word)) for word in the_line("monailabel start_server", README)] + ["--port", str(port)]
    with (temporary.parent / "server.log").open("w") as log:
        process = subprocess.Popen(line, env=environment, cwd=temporary.parent, stdout=log, stderr=log)
    address, began = f"http://127.0.0.1:{port}", time.time()
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/info/", timeout=PATIENCE).read()
                break
            except OSError:
                told = Path(log.name).read_text()[-3000:]
                assert process.poll() is None and time.time() - began < PATIENCE, told
                time.sleep(1)
        client = MONAILabelClient(address, tmpdir=str(tmp_path_factory.mktemp("client")))
        client.process, client.temporary = process, (temporary, app_folder / TEMPORARY_FOLDER)
        client.at_start = left_over(*client.temporary)  # the host's own settings for its log, written once
        yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)


def by_bundle(studies: Path, moving: str, fixed: str, output: Path) -> Path:
    """The folder that the bundle writes for the same pair."""
    registrar = Registrar(bundle_folder("sacb_net"), device="cpu", spacing=SPACING)
    scans = (studies / f"{name}.nii.gz" for name in (moving, fixed))
    return registrar.register(*scans, output, moving_label=label_of(studies, moving)).folder


def assert_same_image(found: str | Path, expected: Path, like: Path) -> None:
    mine, theirs = itk.imread(str(found)), itk.imread(str(expected))
    np.testing.assert_array_equal(itk.array_from_image(mine), itk.array_from_image(theirs))
    np.testing.assert_array_equal(io.affine_of(mine), io.affine_of(theirs))
    np.testing.assert_allclose(io.affine_of(mine), io.affine_of(itk.imread(str(like))), atol=1e-5)  # NIfTI: float32


def left_over(*folders: Path) -> list[str]:
    """Files in folders for temporary ones, and below."""
    return sorted(str(path) for folder in folders for path in folder.rglob("*") if path.is_file())


def assert_nothing_new(server: MONAILabelClient) -> None:
    """The server removes files after it has answered: wait for that."""
    until = time.time() + SETTLE
    while (found := left_over(*server.temporary)) != server.at_start and time.time() < until:
        time.sleep(0.1)
    assert found == server.at_start


def asked(server: MONAILabelClient, model: str, image: str, options: dict, **more: str) -> tuple[str | None, dict]:
    """File and JSON of a request; the client gives JSON that comes without a file as it came, as bytes."""
    file, result = server.infer(model, image, options, **more)
    return file, json.loads(result) if isinstance(result, bytes) else result


def test_info(app: RegistrationApp) -> None:
    models = app.info()["models"]
    assert models["sacb_net_propagate"]["type"] == "segmentation" and models["sacb_net_register"]["type"] == "others"
    assert models["sacb_net_propagate"]["config"]["moving"] == ["atlas"]
    assert models["sacb_net_register"]["config"]["moving"] == ["atlas", "flat", "p2", "p3", "patient"]
    assert models["sacb_net_propagate"]["labels"]["label_1"] == 1
    json.dumps(models)


def test_problems_are_sentences(
    app: RegistrationApp, studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = "sacb_net_propagate"
    for asked, sentence in (
        ({"model": "nothing", "image": "patient"}, "model: must be one of sacb_net_propagate, sacb_net_register"),
        (
            {"model": model, "image": "p9", "moving": "atlas"},
            "image: no scan of the studies has the id 'p9'; there are 5",
        ),
        ({"model": model, "image": "patient", "moving": "p2"}, "p2: has no label 'final' to propagate"),
        (
            {"model": model, "image": "patient", "moving": "ghost"},
            "moving: there is a label of 'ghost' among the studies, but",
        ),
        (
            {"model": model, "image": "flat", "moving": "atlas"},
            f"{studies}/flat.nii.gz: must be a 3-D scan, got 2-D data",
        ),
        ({"model": model, "image": "p2", "refine_steps": "$exit()"}, "refine_steps: must be a whole number from 0"),
        ({"model": "sacb_net_register", "image": "patient", "moving": "p2", "returns": "x"}, "returns: must be one of"),
    ):
        answer = app.infer(asked)
        assert answer["file"] is None and answer["params"]["error"].startswith(sentence), answer
    assert left_over(tmp_path) == []


def test_registration(app: RegistrationApp, studies: Path, tmp_path: Path) -> None:
    """The warped scan, the transform, and everything in one archive; nothing is saved as a label."""
    asked = {"model": "sacb_net_register", "image": "patient", "moving": "atlas", "save_label": True}
    expected = by_bundle(studies, "atlas", "patient", tmp_path)
    for returned, ending in (("warped", ".nii.gz"), ("transform", ".h5"), ("all", ".zip")):
        answer = app.infer(asked | {"returns": returned})
        file = Path(answer["file"])
        assert file.name.endswith(ending) and answer["params"]["registration"]["ncc_after"] > 0.5
        if returned == "warped":
            assert_same_image(file, expected / "warped.nii.gz", studies / "patient.nii.gz")
        elif returned == "transform":
            points = np.random.default_rng(0).uniform(-40, 40, (20, 3))
            mine, theirs = (
                mapping.map_points(read_transform(f), points) for f in (file, expected / "transform.h5")
            )
            np.testing.assert_array_equal(mine, theirs)
        else:
            names = set(zipfile.ZipFile(file).namelist())
            assert names >= {path.name for path in expected.iterdir() if path.name != "warped_label.nii.gz"}
            assert "inverse_transform.h5" in names
        file.unlink()
    assert not any(label_of(studies, "patient", tag).exists() for tag in ("final", "original"))


def test_server_propagates(server: MONAILabelClient, studies: Path, tmp_path: Path) -> None:
    """To a scan of the studies and to an upload."""
    assert server.info()["models"]["sacb_net_propagate"]["config"]["moving"] == ["atlas"]
    for name, image, more in (("patient", "patient", {}), ("p3", "", {"file": str(studies / "p3.nii.gz")})):
        file, result = asked(server, "sacb_net_propagate", image, {"moving": "atlas"}, **more)
        expected = by_bundle(studies, "atlas", name, tmp_path) / "warped_label.nii.gz"
        assert_same_image(file, expected, studies / f"{name}.nii.gz")
        assert result["label_names"]["label_1"] == 1
        assert name != "patient" or result["registration"]["id"] == "atlas_to_patient"
    file, result = asked(server, "sacb_net_propagate", "patient", {"moving": "p2"})
    assert file is None and result["error"] == "p2: has no label 'final' to propagate, none at all"
    assert server.temporary[1].stat().st_mode & 0o077 == 0, "uploads and results are of patients"
    assert_nothing_new(server)


def test_server_says_what_is_wrong(server: MONAILabelClient, studies: Path) -> None:
    """The sentence, with status 200; also for files of the server that are called as the host calls an upload."""
    files = [server.temporary[0] / "tmpa1b2c3.nii.gz", studies / "p3.nii.gz", Path("/etc/hostname")]
    shutil.copy(studies / "p3.nii.gz", files[0])
    model, unknown = "sacb_net_propagate", "image: no scan of the studies has the id"
    for image, moving, sentence in (
        ("nobody", "atlas", f"{unknown} 'nobody'; there are 5, as 'atlas'"),
        ("patient", "nobody", "moving: no scan of the studies has the id 'nobody'; there are 5, as 'atlas'"),
        ("flat", "atlas", f"{studies}/flat.nii.gz: must be a 3-D scan, got 2-D data"),
        ("patient", "ghost", "moving: there is a label of 'ghost' among the studies, but not the scan that it belongs"),
        ("ghost", "atlas", "image: there is a label of 'ghost' among the studies, but not the scan that it belongs"),
        *((str(file), "atlas", f"{unknown} {str(file)!r}"[:80]) for file in files),
    ):
        file, result = asked(server, model, image, {"moving": moving})
        assert file is None and result["error"].startswith(sentence), (image, moving, result)
        file, result = asked(server, model, "patient", {"moving": moving, "image": image})  # params come last
        assert file is None and result["error"].startswith(sentence), (image, moving, result)
    file, result = asked(server, "nothing", "patient", {"moving": "atlas"})
    assert file is None and result["error"].startswith("model: must be one of sacb_net_propagate, sacb_net_register")
    files[0].unlink()
    assert_nothing_new(server)


def of_the_readme(server: MONAILabelClient, folder: Path, begin: str, **words: str) -> subprocess.CompletedProcess:
    """Run the README's line that has `begin` in it, as it stands but for the address; `words` are replaced."""
    (line,) = [line for line in lines_of(README) if line[0] == "curl" and begin in " ".join(line)]
    text = " ".join(word if word == "||" else shlex.quote(word) for word in line)
    assert "http://127.0.0.1:8000" in text
    for old, new in ({"http://127.0.0.1:8000": server.get_server_url()} | words).items():
        text = text.replace(old, new)
    return subprocess.run(["bash", "-c", text], cwd=folder, capture_output=True, text=True, timeout=PATIENCE)


@needs_curl
def test_lines_of_the_readme(server: MONAILabelClient, studies: Path, tmp_path: Path) -> None:
    """Each gives its file; where something is wrong the sentence is on the screen, and a file of before stays."""
    assert len([line for line in lines_of(README) if line[0] == "curl"]) == 4, "the two of the batch have their test"
    expected = by_bundle(studies, "atlas", "patient", tmp_path / "expected")
    for begin in ("sacb_net_propagate?image=patient", "sacb_net_register?image=patient"):
        done = of_the_readme(server, tmp_path, begin)
        assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr
    assert_same_image(tmp_path / "label.nii.gz", expected / "warped_label.nii.gz", studies / "patient.nii.gz")
    points = np.random.default_rng(0).uniform(-40, 40, (20, 3))
    files = tmp_path / "t.h5", expected / "transform.h5"
    np.testing.assert_array_equal(*(mapping.map_points(read_transform(file), points) for file in files))
    before = (tmp_path / "t.h5").read_bytes()
    (tmp_path / "label.nii.gz").unlink()
    for begin in ("sacb_net_propagate?image=patient", "sacb_net_register?image=patient"):
        done = of_the_readme(server, tmp_path, begin, atlas="nobody")
        assert json.loads(done.stdout)["error"].startswith("moving: no scan of the studies has the id 'nobody'"), done
    assert not (tmp_path / "label.nii.gz").exists() and (tmp_path / "t.h5").read_bytes() == before
    assert_nothing_new(server)


@needs_curl
def test_batch_of_the_readme(server: MONAILabelClient, studies: Path, tmp_path: Path) -> None:
    """It runs in the background; its end, and what failed, are to be asked for."""
    done = of_the_readme(server, tmp_path, "-X POST")
    assert json.loads(done.stdout)["status"] in ("SUBMITTED", "RUNNING"), done
    until = time.time() + PATIENCE
    while (told := json.loads(of_the_readme(server, tmp_path, "curl http").stdout))["status"] != "DONE":
        assert told["status"] in ("SUBMITTED", "RUNNING") and time.time() < until, told
        time.sleep(1)
    failed = [line for line in told["details"] if " failed: " in line]
    assert len(failed) == 1 and f"flat failed: {studies}/flat.nii.gz: must be a 3-D scan" in failed[0], told
    for name in ("patient", "p2", "p3"):
        expected = by_bundle(studies, "atlas", name, tmp_path / name) / "warped_label.nii.gz"
        assert_same_image(label_of(studies, name, "original"), expected, studies / f"{name}.nii.gz")
        label_of(studies, name, "original").unlink()
    assert_nothing_new(server)


def test_server_batch(server: MONAILabelClient, studies: Path) -> None:
    """An atlas to all scans without a final label; the single slice fails alone, and no temporary file is left."""
    before = {path: path.stat().st_mtime_ns for path in studies.glob("*.nii.gz")}
    url = f"{server.get_server_url()}/batch/infer/sacb_net_propagate?images=unlabeled&run_sync=true"
    body = json.dumps({"moving": "atlas"}).encode()
    asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    answer = json.loads(urllib.request.urlopen(asked, timeout=PATIENCE).read())
    assert set(answer) == {"patient", "p2", "p3", "flat"}
    assert "must be a 3-D scan" in answer["flat"]["params"]["error"]
    for name in ("patient", "p2", "p3"):
        assert (io.read_scan(label_of(studies, name, "original"))[0] > 0).any()
    assert before == {path: path.stat().st_mtime_ns for path in studies.glob("*.nii.gz")}
    assert_nothing_new(server)


def test_server_does_not_leak(server: MONAILabelClient) -> None:
    """20 requests: no temporary file is left, and memory stops growing."""
    used = []
    for n in range(20):
        model, options = (
            ("sacb_net_propagate", {"moving": "atlas"}),
            ("sacb_net_register", {"moving": "atlas", "returns": "transform"}),
            ("sacb_net_propagate", {"moving": "nobody"}),
        )[n % 3]
        file, result = asked(server, model, ("patient", "p2")[n % 2], options)
        assert ("error" in result) == (n % 3 == 2) == (file is None)
        used.append(resident_mib(server.process.pid))
    assert_nothing_new(server)
    growth = used[-1] - used[7]
    print(f"resident memory in MiB: {used[0]:.0f} after 1, {used[7]:.0f} after 8, {used[-1]:.0f} after 20 requests")
    assert growth < 20, used


def resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))
