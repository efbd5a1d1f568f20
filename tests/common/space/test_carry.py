"""Several files, films and labels through one transform."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common import InputError, phantom
from common.space import carry, io, mapping

SHIFT = mapping.affine_transform(nib.affines.from_matvec(np.eye(3), [2.0, 0.0, -1.0]))


@pytest.fixture(scope="module")
def brain() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    affine = nib.affines.from_matvec(np.diag([4.0] * 3), [-70.0, -86, -66])
    return *phantom.sample((36, 44, 34), affine), affine


def test_labels_are_told_from_scans(brain: tuple) -> None:
    scan, label, _ = brain
    assert carry.is_label(label[None]) and carry.is_label((label[None] > 0) * 1.0)
    assert not carry.is_label(scan[None]) and not carry.is_label(np.rint(scan[None] / 4))


def test_a_film_is_carried_time_by_time(brain: tuple, tmp_path: Path) -> None:
    scan, label, affine = brain
    for name, one, how in (("scans", scan, "auto"), ("labels", label, "auto"), ("labels", label, "linear")):
        carry.write_film(np.stack([one, one[::-1]]).astype(np.int16), affine, 2.5, tmp_path / f"{name}.nii.gz")
        io.write_scan(one.astype(np.int16), affine, tmp_path / "one.nii.gz")
        options = {"reference": str(tmp_path / "one.nii.gz"), "label": how}
        text = carry.carry(str(tmp_path / f"{name}.nii.gz"), SHIFT, str(tmp_path / "film.nii.gz"), **options)
        carry.carry(str(tmp_path / "one.nii.gz"), SHIFT, str(tmp_path / "alone.nii.gz"), **options)
        film = nib.load(tmp_path / "film.nii.gz")
        assert film.shape == (36, 44, 34, 2) and film.header.get_zooms()[3] == 2.5 and "2 times" in text
        assert ("labels" in text) == (name == "labels")
        np.testing.assert_array_equal(film.get_fdata()[..., 0], nib.load(tmp_path / "alone.nii.gz").get_fdata())
    assert carry.read_film(tmp_path / "one.nii.gz") is None


def test_votes_are_the_largest_of_each_label_interpolated(brain: tuple) -> None:
    _, label, affine = brain
    turned = mapping.affine_transform(nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, 0.1, -0.3), [1, 2, 3]))
    grid = label.shape, affine
    found = mapping.resample(label, affine, *grid, turned, voted=True)
    codes = np.unique(label)
    shares = [mapping.resample((label == c).astype(np.float32), affine, *grid, turned, outside=c == 0) for c in codes]
    ordered = np.sort(shares, 0)
    clear = ordered[-1] - ordered[-2] > 1e-4  # what is no tie
    np.testing.assert_array_equal(found[clear], codes[np.argmax(shares, 0)][clear])
    assert clear.mean() > 0.99 and (found != mapping.resample(label, affine, *grid, turned, nearest=True)).mean() > 0.01
    assert found.dtype == label.dtype


def test_names_in_a_folder() -> None:
    names = carry.names_in("o", ("a/x.nii.gz", "y.mrk.json", "dicom"))
    assert names == ["o/x.nii.gz", "o/y.mrk.json", "o/dicom.nii.gz"]
    with pytest.raises(InputError, match="o: two of the files would both be called x.nii.gz there"):
        carry.names_in("o", ("a/x.nii.gz", "b/x.nii.gz"))
