"""Two DICOM series through the Deploy SDK, each app in a process of its own; and the SDK's own bundle operator."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from dicom_series import write_series
from forks import PATIENCE
from monai.bundle import ConfigParser
from people import SPACING
from printed_lines import the_line
from registration_object import by_the_standard, errors_of_dciodvfy, needs_dciodvfy

from common import phantom
from common.deploy.dsro import read_dsro
from common.deploy.series import find_series
from common.publish import pack
from common.run.cli import bundle_folder
from common.run.registrar import Registrar
from common.space import io, mapping
from common.space.transform_files import read_transform

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
if importlib.util.find_spec("monai.deploy") is None:
    pytest.skip("the MONAI Deploy App SDK is not installed; common/deploy/README.md", allow_module_level=True)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders fixed and moving: two people, each on an oblique grid, as series of slices."""
    folder = tmp_path_factory.mktemp("series")
    grids = {"fixed": ((5, 5, 6.0), (36, 40, 26)), "moving": ((4.5, 5, 5.0), (40, 42, 30))}
    for seed, (name, (spacing, size)) in enumerate(grids.items()):
        linear = nib.eulerangles.euler2mat(0.1 * seed, 0.05, -0.1) @ np.diag([-spacing[0], -spacing[1], spacing[2]])
        affine = nib.affines.from_matvec(linear, -linear @ ((np.array(size) - 1) / 2))
        scan = phantom.sample(size, affine, phantom.Deformation(seed, amplitude=8), seed=seed)[0]
        write_series(scan, affine, folder / name, patient="P1", description=name)
    return folder


def python(*words: object) -> subprocess.CompletedProcess:
    line = [sys.executable, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def run(fixed: Path, moving: Path, output: Path) -> subprocess.CompletedProcess:
    """The README's line, on a coarse grid."""
    words = the_line("python -m common deploy run", ROOT / "common" / "deploy" / "README.md")
    for option, value in {"--fixed": fixed, "--moving": moving, "--output": output}.items():
        words[words.index(option) + 1] = value
    return python(*words[1:], "--spacing", SPACING, "--device", "cpu")


@pytest.fixture(scope="module")
def made(series: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair's folder that the app writes."""
    output = tmp_path_factory.mktemp("made") / "out"
    done = run(series / "fixed", series / "moving", output)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("pair registered") == 1
    assert [path.name for path in output.iterdir()] == ["moving_to_fixed"]
    return output / "moving_to_fixed"


def test_pair(series: Path, made: Path, tmp_path: Path) -> None:
    """The same result as the bundle gives for the two folders."""
    registrar = Registrar(bundle_folder("sacb_net"), device="cpu", spacing=SPACING)
    found = registrar.register(series / "moving", series / "fixed", tmp_path / "expected")
    row, expected = found.row, found.folder
    assert row["ncc_before"] > 0.8
    assert {p.name for p in made.iterdir()} == {p.name for p in expected.iterdir()} | {"registration.dcm"}
    (mine, affine), (theirs, _) = (io.read_scan(folder / "warped.nii.gz") for folder in (made, expected))
    (scan, own), (fixed, onto) = (io.read_scan(series / role) for role in ("moving", "fixed"))
    np.testing.assert_allclose(affine, onto, atol=1e-4)
    again = mapping.resample(scan[0], own, fixed.shape[1:], onto, read_transform(made / "transform.h5"))
    assert np.abs(again - mine[0]).mean() < 0.05, "of 1000: the slices as ITK reads them, where the transform says"
    assert np.abs(mine - theirs).mean() < 2, "of 1000: the bundle's own result, but for rounding in the alignment"


def test_object_says_what_the_transform_says(series: Path, made: Path) -> None:
    """registration.dcm of the app against its transform.h5: by our reader, and by the standard's formula."""
    landmarks = np.array(list(phantom.LANDMARKS.values())) * [-1, -1, 1]
    there = mapping.map_points(read_transform(made / "transform.h5"), landmarks)
    assert np.linalg.norm(there - landmarks, axis=1).max() > 1
    found = {
        "read_dsro": read_dsro(made / "registration.dcm").map_points(landmarks),
        "the standard": by_the_standard(made / "registration.dcm", landmarks),
    }
    for by, points in found.items():
        apart = np.linalg.norm(points - there, axis=1)
        assert apart.max() < 0.1, (by, apart)
        print(f"registration.dcm by {by} against transform.h5 at {len(apart)} landmarks: at most {apart.max():.1e} mm")
    data = pydicom.dcmread(made / "registration.dcm")
    told = [
        {reference.ReferencedSOPInstanceUID for reference in item.ReferencedImageSequence}
        for item in data.DeformableRegistrationSequence
    ]
    headers = [find_series(series / role).headers for role in ("fixed", "moving")]
    assert told == [{header.SOPInstanceUID for header in each} for each in headers]


@needs_dciodvfy
def test_dciodvfy_accepts(made: Path) -> None:
    assert errors_of_dciodvfy(made / "registration.dcm") == []


def test_sentences(series: Path, tmp_path: Path) -> None:
    """One sentence, exit code 1, nothing written; test_series.py has all that are about a folder."""
    for fixed, sentence in (
        (series, f"{series}: holds 2 series, name one of them: "),
        (series / "moving", f"{series}/moving: holds the fixed series itself, "),
    ):
        done = run(fixed, series / "moving", tmp_path / "out")
        assert done.returncode == 1 and f"error: {sentence}" in done.stderr, done.stderr[-2000:]
        assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["sacb_net", "samconvex"])
def test_stock_operator(name: str, tmp_path: Path) -> None:
    """MonaiBundleInferenceOperator runs the packed bundle by configs/deploy.json; its output stays as it is."""
    with zipfile.ZipFile(pack.pack(name, output=tmp_path / "dist")[0]) as file:
        file.extractall(tmp_path)
    image = np.random.default_rng(0).random((32, 48, 32, 2), dtype=np.float32)
    np.save(tmp_path / "image.npy", image)
    app = Path(__file__).parent / "stock_app.py"
    done = python(app, tmp_path / name, tmp_path / "image.npy", tmp_path / "pred.npy")
    assert (tmp_path / "pred.npy").exists(), done.stdout[-2000:] + done.stderr[-4000:]
    parser = ConfigParser()
    parser.read_config(str(bundle_folder(name) / "configs" / "inference.json"))
    parser.update({"bundle_root": str(bundle_folder(name)), "device": "cpu"})
    with torch.no_grad():
        network = parser.get_parsed_content("network").eval()
        expected = network(torch.from_numpy(np.moveaxis(image, -1, 0))[None])[0].numpy()
    found = np.load(tmp_path / "pred.npy")
    assert found.dtype == np.float32 and found.shape == (3, 32, 48, 32)
    assert np.abs(found - np.rint(found)).max() > 0.1 and found.min() < 0, "fractions and signs are kept"
    np.testing.assert_allclose(found, expected, atol=1e-4)
