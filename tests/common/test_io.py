"""Files: geometry round trips, refusals in one sentence, whole folders or none."""

from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest

from common import io

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, -0.2, 0.1) @ np.diag([-1.5, 2.0, 2.5]), [10.0, -20.0, 30.0]
)


@pytest.fixture
def scan(rng: np.random.Generator) -> np.ndarray:
    return rng.random((11, 12, 13)).astype(np.float32)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_write_and_read_keep_values_and_space(scan: np.ndarray, tmp_path: Path) -> None:
    io.write_scan(scan, OBLIQUE, tmp_path / "scan.nii.gz")
    array, affine = io.read_scan(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(array[0], scan)
    np.testing.assert_allclose(affine, OBLIQUE, atol=1e-4)
    np.testing.assert_allclose(nib.load(tmp_path / "scan.nii.gz").affine, OBLIQUE, atol=1e-4)


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_reads_what_itk_writes(scan: np.ndarray, tmp_path: Path, ending: str) -> None:
    itk.imwrite(io.to_itk(scan, OBLIQUE), str(tmp_path / f"scan{ending}"))
    array, affine = io.read_scan(tmp_path / f"scan{ending}")
    np.testing.assert_allclose(array[0], scan, atol=1e-6)
    np.testing.assert_allclose(affine, OBLIQUE, atol=1e-4)


def test_reads_channels_first(tmp_path: Path, rng: np.random.Generator) -> None:
    two = rng.random((2, 6, 7, 8)).astype(np.float32)
    io.write_scan(two, OBLIQUE, tmp_path / "two.nii.gz")
    np.testing.assert_allclose(io.read_scan(tmp_path / "two.nii.gz")[0], two, atol=1e-6)


def test_label_files_keep_every_value(tmp_path: Path) -> None:
    for top, kind in ((255, np.uint8), (3000, np.int16), (70000, np.int32)):
        label = np.array([0, 1, top]).reshape(3, 1, 1) * np.ones((3, 2, 2))
        io.write_label(label, np.eye(4), tmp_path / "l.nii.gz")
        file = nib.load(tmp_path / "l.nii.gz")
        assert file.get_data_dtype() == kind and np.asarray(file.dataobj).max() == top


def test_refusals_name_the_file_and_the_fault(tmp_path: Path) -> None:
    cases = {
        "missing.nii.gz": (None, "no such file"),
        "text.nii.gz": ("hello", "not an image"),
        "flat.nii.gz": (np.ones((5, 6), np.float32), "must be a 3-D scan"),
        "slice.nii.gz": (np.ones((5, 6, 1), np.float32), "must be a 3-D scan"),
        "film.nii.gz": (np.ones((5, 6, 7, 3), np.float32), "must be a 3-D scan"),
        "hole.nii.gz": (np.full((5, 6, 7), np.nan, np.float32), "NaN"),
    }
    for name, (content, words) in cases.items():
        path = tmp_path / name
        if isinstance(content, str):
            path.write_text(content)
        elif content is not None:
            nib.save(nib.Nifti1Image(content, np.eye(4)), path)
        with pytest.raises(io.InputError, match=words) as caught:
            io.read_scan(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "pair"
    io.write_folder(target, {"a.txt": lambda p: p.write_text("old")})

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        io.write_folder(target, {"a.txt": lambda p: p.write_text("new"), "b.txt": fail})
    assert [p.name for p in tmp_path.iterdir()] == ["pair"] and (target / "a.txt").read_text() == "old"
    io.write_folder(target, {"c.txt": lambda p: p.write_text("new")})
    assert [p.name for p in target.iterdir()] == ["c.txt"] and [p.name for p in tmp_path.iterdir()] == ["pair"]
