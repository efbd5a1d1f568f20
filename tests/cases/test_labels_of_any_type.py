"""Label maps of every integer type and code, and of overlapping structures: what goes in comes out."""

import gzip
import sys
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest

from common import InputError, __main__
from common.run.transforms import AlignAndGridd, DeliverPaird, LoadScansd, PackPaird
from common.space import io, mapping

AFFINE = np.array([[2.0, 0, 0, -10], [0, 2, 0, 5], [0, 0, 3, 7], [0, 0, 0, 1]])
SHAPE = (12, 14, 10)
IDENTITY = (
    "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
    "Parameters: 1 0 0 0 1 0 0 0 1 0 0 0\nFixedParameters: 0 0 0\n"
)
ALLEN = 312782574  # a code of the Allen atlas, above 2^24 and odd when divided by 2


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def apply(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch):
    """`python -m common apply FILE identity OUT --reference fixed --label`; the name of OUT, or the sentence."""
    nib.save(nib.Nifti1Image(rng.random(SHAPE).astype(np.float32), AFFINE), tmp_path / "fixed.nii.gz")
    (tmp_path / "id.tfm").write_text(IDENTITY)

    def run(file: Path, output: str) -> Path:
        words = ["apply", file, tmp_path / "id.tfm", tmp_path / output, "--reference", tmp_path / "fixed.nii.gz"]
        monkeypatch.setattr(sys, "argv", ["common", *map(str, words), "--label"])
        __main__.main()
        return tmp_path / output

    return run


TOPS = {
    np.int8: -7,
    np.uint8: 255,
    np.int16: -3000,
    np.uint16: 65000,
    np.int32: ALLEN,
    np.uint32: 2**32 - 1,
    np.int64: 2**53 + 1,
    np.uint64: 2**60 + 1,
    np.float32: 2**24,
    np.float64: ALLEN,
}


@pytest.mark.parametrize("kind", TOPS)
def test_every_type_comes_out_as_it_went_in(rng: np.random.Generator, tmp_path: Path, apply, kind: type) -> None:
    label = rng.integers(0, 4, SHAPE).astype(kind)
    label[3:6, 3:6, 3:6] = TOPS[kind]
    nib.save(nib.Nifti1Image(label, AFFINE, dtype=kind), tmp_path / "l.nii.gz")
    codes, affine = io.read_label(tmp_path / "l.nii.gz")
    np.testing.assert_array_equal(codes[0].astype(kind), label)
    np.testing.assert_allclose(affine, AFFINE, atol=1e-5)
    out = apply(tmp_path / "l.nii.gz", "out.nii.gz")
    np.testing.assert_array_equal(np.asarray(nib.load(out).dataobj).astype(kind), label)
    np.testing.assert_array_equal(io.read_label(out)[0], codes)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
@pytest.mark.parametrize("top", [ALLEN, 2**32 - 1, 2**50 + 1, -(2**40)])
def test_large_codes_in_other_formats(tmp_path: Path, ending: str, top: int) -> None:
    label = np.zeros(SHAPE, np.int64)
    label[3:6, 3:6, 3:6] = top
    io.write_label(label, AFFINE, tmp_path / f"l{ending}")
    np.testing.assert_array_equal(io.read_label(tmp_path / f"l{ending}")[0][0], label)


def test_codes_that_a_format_cannot_hold(tmp_path: Path) -> None:
    label = np.full(SHAPE, 2**60 + 1)
    with pytest.raises(InputError, match="l.mha: codes of labels .* fit into .nii.gz only"):
        io.write_label(label, AFFINE, tmp_path / "l.mha")
    io.write_label(label, AFFINE, tmp_path / "l.nii.gz")
    nib.save(nib.Nifti1Image(np.full(SHAPE, 2**63, np.uint64), AFFINE, dtype=np.uint64), tmp_path / "u.nii.gz")
    with pytest.raises(InputError, match="u.nii.gz: codes of labels go up to 2.63 - 1"):
        io.read_label(tmp_path / "u.nii.gz")


@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.int8, np.uint32])
def test_scans_of_every_type_are_read(rng: np.random.Generator, tmp_path: Path, kind: type) -> None:
    scan = rng.integers(0, 100, SHAPE).astype(kind)
    nib.save(nib.Nifti1Image(scan, AFFINE, dtype=kind), tmp_path / "s.nii.gz")
    np.testing.assert_array_equal(io.read_scan(tmp_path / "s.nii.gz")[0][0], scan)


def test_a_run_keeps_large_codes(rng: np.random.Generator, tmp_path: Path) -> None:
    """warped_label.nii.gz has the codes of the file, by a displacement that moves one voxel."""
    import torch

    scan = (rng.random((16, 16, 16)) + 0.1).astype(np.float32)
    label = rng.choice([0, ALLEN, ALLEN + 1, ALLEN + 3], (16, 16, 16))
    nib.save(nib.Nifti1Image(scan, np.eye(4)), tmp_path / "s.nii.gz")
    nib.save(nib.Nifti1Image(label, np.eye(4), dtype=np.int64), tmp_path / "l.nii.gz")
    data = {"id": "pair"} | {key: str(tmp_path / "s.nii.gz") for key in ("moving", "fixed")}
    data |= {f"{key}_label": str(tmp_path / "l.nii.gz") for key in ("moving", "fixed")}
    for step in (LoadScansd(), AlignAndGridd(None, "none", divisor=1, crop=False), PackPaird()):
        data = step(data)
    disp = torch.zeros(3, 16, 16, 16)
    disp[0] = 1
    done = DeliverPaird(str(tmp_path / "out"), surface=False)(data | {"pred": disp})
    warped = np.asarray(nib.load(tmp_path / "out" / "pair" / "warped_label.nii.gz").dataobj)
    np.testing.assert_array_equal(warped[:-1], label[1:])
    assert done["row"]["labels"] == 3 and done["row"]["dice_before"] == 1


def vectors(masks: np.ndarray, path: Path, kinds: str = "vector", fields: str = "") -> Path:
    """(C, I, J, K) as NRRD with the channels first, as one-hot maps and 3-D Slicer's layers are."""
    sizes = " ".join(map(str, masks.shape))
    head = f"NRRD0004\ntype: {'float' if masks.dtype.kind == 'f' else 'unsigned char'}\nendian: little\ndimension: 4\n"
    head += f"space: left-posterior-superior\nsizes: {sizes}\nspace directions: none (-2,0,0) (0,-2,0) (0,0,3)\n"
    head += f"kinds: {kinds} domain domain domain\nencoding: gzip\nspace origin: (10,-5,7)\n{fields}\n"
    path.write_bytes(head.encode() + gzip.compress(np.ascontiguousarray(masks.transpose(3, 2, 1, 0)).tobytes()))
    return path


@pytest.mark.parametrize("kind", [np.float32, np.uint8])
@pytest.mark.parametrize("output", ["out.nrrd", "out.nii.gz", "out.mha"])
def test_channels_are_all_kept(rng: np.random.Generator, tmp_path: Path, apply, kind: type, output: str) -> None:
    masks = (rng.random((3, *SHAPE)) > 0.7).astype(kind)
    found, affine = io.read_label(apply(vectors(masks, tmp_path / "three.nrrd"), output))
    np.testing.assert_array_equal(found, masks)
    np.testing.assert_allclose(affine, AFFINE, atol=1e-5)


def test_segmentations_of_slicer_with_layers(rng: np.random.Generator, tmp_path: Path, apply) -> None:
    layers = rng.integers(0, 3, (2, *SHAPE)).astype(np.uint8)
    fields = "Segment0_ID:=a\nSegment0_LabelValue:=1\nSegment0_Layer:=0\n"
    path = vectors(layers, tmp_path / "s.seg.nrrd", "list", fields)
    np.testing.assert_array_equal(io.read_label(apply(path, "out.nrrd"))[0], layers)


def test_channels_beside_a_scan_are_refused_with_the_cure(rng: np.random.Generator, tmp_path: Path) -> None:
    path = vectors((rng.random((3, *SHAPE)) > 0.7).astype(np.uint8), tmp_path / "three.nrrd")
    scan = rng.random((1, *SHAPE)).astype(np.float32)
    with pytest.raises(InputError, match="three.nrrd: a label map has one channel, .* 3 channels; give one structure"):
        io.read_beside(path, "label map", "scan.nii.gz", scan, AFFINE)


def test_one_hot_as_a_film_keeps_every_channel(rng: np.random.Generator, tmp_path: Path, apply) -> None:
    channels = (rng.random((*SHAPE, 3)) > 0.7).astype(np.uint8)
    nib.save(nib.Nifti1Image(channels, AFFINE), tmp_path / "f.nii.gz")
    np.testing.assert_array_equal(nib.load(apply(tmp_path / "f.nii.gz", "out.nii.gz")).dataobj, channels)


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_what_is_not_a_label_is_refused(rng: np.random.Generator, tmp_path: Path, apply, value: float) -> None:
    scan = rng.integers(0, 4, SHAPE).astype(np.float32)
    scan[4, 4, 4] = value
    nib.save(nib.Nifti1Image(scan, AFFINE), tmp_path / "s.nii.gz")
    with pytest.raises(SystemExit, match="error: .*s.nii.gz: (a label map has whole numbers|holds NaN)"):
        apply(tmp_path / "s.nii.gz", "out.nii.gz")
    assert not (tmp_path / "out.nii.gz").exists()


def test_nearest_neighbour_of_whole_numbers_is_exact(rng: np.random.Generator) -> None:
    """As ITK finds it with float32 for small codes; every digit for large ones; outside is 0."""
    label = rng.integers(0, 9, SHAPE)
    shift = mapping.affine_transform(nib.affines.from_matvec(np.eye(3), [3.3, -2.1, 5.0]))
    small = mapping.resample(label.astype(np.float32), AFFINE, SHAPE, AFFINE, shift, nearest=True)
    large = mapping.resample(label * (2**55 + 1), AFFINE, SHAPE, AFFINE, shift, nearest=True)
    np.testing.assert_array_equal(large, small.astype(np.int64) * (2**55 + 1))
    full = mapping.resample(label + 2**55, AFFINE, SHAPE, AFFINE, shift, nearest=True)
    assert full.dtype == np.int64 and (full == 0).any() and set(np.unique(full)) <= {0, *(label + 2**55).ravel()}


def test_complex_values_are_refused(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.ones(SHAPE, np.complex64), AFFINE), tmp_path / "c.nii.gz")
    with pytest.raises(InputError, match="c.nii.gz: holds complex values"):
        io.read_scan(tmp_path / "c.nii.gz")


def test_itk_reads_what_is_written(tmp_path: Path) -> None:
    label = np.zeros(SHAPE, np.int64)
    label[3:6, 3:6, 3:6] = ALLEN
    io.write_label(label, AFFINE, tmp_path / "l.nii.gz")
    np.testing.assert_array_equal(itk.array_from_image(itk.imread(str(tmp_path / "l.nii.gz"))).T, label)
