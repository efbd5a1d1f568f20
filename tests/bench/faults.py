"""Files with something wrong in them: each fault takes a folder and gives the path of a bad file, or of none.

A fault that a command may take with a fitting warning carries its pattern in FITS; one that turns out harmless, because
every reader would take the file as it is, its name in HARMLESS.
"""

import gzip
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import torch
from machine import ROOT
from outcomes import RAN

sys.path.insert(0, str(ROOT / "tests" / "common" / "deploy"))
from dicom_series import write_series  # noqa: E402

SIZE, MM = (24, 26, 22), 6.0
AFFINE = nib.affines.from_matvec(np.diag([MM, MM, MM]), -(np.array(SIZE) - 1) / 2 * MM)
Fault = Callable[[Path], Path]


def values(seed: int = 0) -> np.ndarray:
    """A blob with texture, 0 around: a scan that can be registered."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SIZE], indexing="ij"))
    inside = (grid**2).sum(0) < 0.6
    texture = 500 + 200 * np.sin(6 * grid[0]) * np.cos(5 * grid[1] + 0.1 * seed) + 100 * grid[2]
    return (texture * inside).astype(np.float32)


def labels(seed: int = 0) -> np.ndarray:
    return np.digitize(values(seed), [1, 450, 550]).astype(np.int16)


def nifti(array: np.ndarray, path: Path, affine: np.ndarray = AFFINE, **header: object) -> Path:
    image = nib.Nifti1Image(array, affine, dtype=array.dtype)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def patched(name: str, *edits: tuple[int, bytes]) -> Fault:
    """A plain NIfTI with bytes of its header changed, which nibabel would not write."""

    def write(folder: Path) -> Path:
        path = nifti(values(), folder / name)
        content = bytearray(path.read_bytes())
        for at, new in edits:
            content[at : at + len(new)] = new
        path.write_bytes(content)
        return path

    return write


def holding(array: Callable[[], np.ndarray], name: str = "scan.nii.gz") -> Fault:
    return lambda folder: nifti(array(), folder / name)


def text(content: str | bytes, name: str) -> Fault:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def changed(array: np.ndarray, *edits: tuple[object, float]) -> np.ndarray:
    array = array.copy()
    for at, value in edits:
        array[at] = value
    return array


def cut(fault: Fault, share: float) -> Fault:
    def write(folder: Path) -> Path:
        path = fault(folder)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        return path

    return write


def dangling(folder: Path) -> Path:
    (folder / "link.nii.gz").symlink_to(folder / "gone.nii.gz")
    return folder / "link.nii.gz"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.nii.gz")
    return folder / "pipe.nii.gz"


def empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def dicom(*, keep: slice = slice(None), spoil: Callable[[Path], None] = lambda folder: None) -> Fault:
    def write(folder: Path) -> Path:
        into = folder / "series"
        write_series(values(), AFFINE, into, patient="1", description="head")
        files = sorted(into.iterdir())
        for path in set(files) - set(files[keep]):
            path.unlink()
        spoil(into)
        return into

    return write


def second_series(folder: Path) -> None:
    write_series(values(1), AFFINE, folder / "more", patient="1", description="neck")
    for path in (folder / "more").iterdir():
        path.rename(folder / f"more_{path.name}")
    (folder / "more").rmdir()


def without(tag: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        import pydicom

        for path in folder.iterdir():
            data = pydicom.dcmread(path)
            delattr(data, tag)
            data.save_as(path)

    return spoil


def a_hole(folder: Path) -> None:
    for path in sorted(folder.iterdir())[8:12]:
        path.unlink()


def cut_slice(folder: Path) -> None:
    path = sorted(folder.iterdir())[5]
    path.write_bytes(path.read_bytes()[:700])


NAN, INF = float("nan"), float("inf")
F32 = lambda *numbers: np.array(numbers, "<f4").tobytes()  # noqa: E731
I16 = lambda *numbers: np.array(numbers, "<i2").tobytes()  # noqa: E731
SROW, PIXDIM, SLOPE, DIM, TYPE = 280, 76, 112, 40, 70

SCANS: dict[str, Fault] = {
    "missing": lambda folder: folder / "no_such.nii.gz",
    "empty": text(b"", "scan.nii.gz"),
    "empty plain": text(b"", "scan.nii"),
    "text": text("not a scan\n" * 50, "scan.nii.gz"),
    "page": text("<html><body>Login required</body></html>", "scan.nii.gz"),
    "lfs pointer": text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n", "scan.nii.gz"),
    "random bytes": text(np.random.default_rng(0).bytes(4000), "scan.nii"),
    "gzip of nothing": text(gzip.compress(b""), "scan.nii.gz"),
    "gzip of text": text(gzip.compress(b"hello " * 100), "scan.nii.gz"),
    "cut in half": cut(holding(values), 0.5),
    "cut at the end": cut(holding(values), 0.99),
    "cut in the header": cut(holding(values, "scan.nii"), 0.002),
    "cut plain": cut(holding(values, "scan.nii"), 0.6),
    "nan": holding(lambda: changed(values(), ((3, 3, 3), NAN))),
    "all nan": holding(lambda: np.full(SIZE, NAN, np.float32)),
    "infinite": holding(lambda: changed(values(), ((3, 3, 3), INF))),
    "too large for 32 bits": holding(lambda: values().astype(np.float64) * 1e300),
    "constant": holding(lambda: np.full(SIZE, 7, np.float32)),
    "zeros": holding(lambda: np.zeros(SIZE, np.float32)),
    "one slice": holding(lambda: values()[:, :, :1]),
    "two dimensions": holding(lambda: values()[:, :, 0]),
    "one voxel": holding(lambda: values()[12:13, 12:13, 12:13]),
    "series of three": holding(lambda: np.stack([values()] * 3, -1)),
    "five dimensions": holding(lambda: np.stack([values()[..., None]] * 3, -1)),
    "complex": holding(lambda: values().astype(np.complex64)),
    "colours": holding(lambda: np.zeros(SIZE, [("R", "u1"), ("G", "u1"), ("B", "u1")])),
    "sizes of 0": patched("scan.nii", (DIM, I16(3, 24, 0, 22, 1, 1, 1, 1))),
    "sizes below 0": patched("scan.nii", (DIM, I16(3, 24, -26, 22, 1, 1, 1, 1))),
    "huge sizes": patched("scan.nii", (DIM, I16(3, 32000, 32000, 32000, 1, 1, 1, 1))),
    "nine dimensions": patched("scan.nii", (DIM, I16(9))),
    "no type": patched("scan.nii", (TYPE, I16(0))),
    "unknown type": patched("scan.nii", (TYPE, I16(999))),
    "nan slope": patched("scan.nii", (SLOPE, F32(NAN, 0))),
    "infinite slope": patched("scan.nii", (SLOPE, F32(INF, 0))),
    "nan intercept": patched("scan.nii", (SLOPE, F32(1, NAN))),
    "nan in the sform": patched("scan.nii", (SROW, F32(NAN))),
    "infinite sform": patched("scan.nii", (SROW, F32(INF))),
    "sform of zeros": patched("scan.nii", (SROW, F32(*[0] * 12)), (252, I16(0, 1))),
    "flat sform": patched("scan.nii", (SROW, F32(6, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0)), (252, I16(0, 1))),
    "nan spacing": patched("scan.nii", (PIXDIM, F32(1, NAN, 6, 6)), (252, I16(1, 0))),
    "spacing of 0": patched("scan.nii", (PIXDIM, F32(1, 0, 6, 6)), (252, I16(1, 0))),
    "quaternion of 5": patched("scan.nii", (256, F32(5, 5, 5)), (252, I16(1, 0))),
    "far away": lambda folder: nifti(values(), folder / "scan.nii.gz", AFFINE + 1e7 * np.eye(4, k=3)),
    "voxels of 1e-9 mm": lambda folder: nifti(values(), folder / "scan.nii.gz", np.diag([1e-9, 1e-9, 1e-9, 1])),
    "voxels of 1e6 mm": lambda folder: nifti(values(), folder / "scan.nii.gz", np.diag([1e6, 1e6, 1e6, 1])),
    "dangling link": dangling,
    "pipe": pipe,
    "null device": lambda folder: Path("/dev/null"),
    "empty folder": empty_folder,
    "folder of text": lambda folder: text("notes", "notes.txt")(folder).parent,
    "unknown ending": text("x", "scan.xyz"),
    "picture": text(b"\x89PNG\r\n\x1a\n" + bytes(100), "scan.png"),
    "table": text("a,b\n1,2\n", "scan.csv"),
    "mha without data": text("ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\n", "scan.mha"),
    "mhd whose data is missing": text(
        "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_FLOAT\nElementDataFile = no.raw\n",
        "scan.mhd",
    ),
    "nrrd cut off": text("NRRD0004\ntype: float\ndimension: 3\nsizes: 9 9 9\nencoding: raw\n\n1234", "scan.nrrd"),
    "nrrd of nothing": text("NRRD0004\n", "scan.nrrd"),
    "series with a hole": dicom(spoil=a_hole),
    "series of one slice": dicom(keep=slice(0, 1)),
    "two series": dicom(spoil=second_series),
    "no positions": dicom(spoil=without("ImagePositionPatient")),
    "no pixel spacing": dicom(spoil=without("PixelSpacing")),
    "no pixels": dicom(spoil=without("PixelData")),
    "a slice cut off": dicom(spoil=cut_slice),
    "text named .dcm": lambda folder: text("no", "empty/a.dcm")(empty_folder(folder).parent).parent,
}
LABELS: dict[str, Fault] = {
    name: SCANS[name]
    for name in ("missing", "empty", "text", "cut in half", "nan", "one slice", "complex", "dangling link", "no type")
} | {
    "halves": holding(lambda: labels() + np.float32(0.5)),
    "a scan": holding(values),
    "another size": holding(lambda: labels()[:-3]),
    "infinite": holding(lambda: changed(labels().astype(np.float32), ((3, 3, 3), INF))),
    "beyond 64 bits": holding(lambda: labels().astype(np.float64) * 1e30),
    "all background": holding(lambda: labels() * 0),
    "huge codes": holding(lambda: labels().astype(np.int64) * 2**40),
    "codes below 0": holding(lambda: -labels()),
}
POINTS: dict[str, Fault] = {
    "missing": lambda folder: folder / "points.csv",
    "empty": text("", "points.csv"),
    "a header alone": text("x,y,z\n", "points.csv"),
    "words": text("x,y,z\na,b,c\n", "points.csv"),
    "two columns": text("x,y\n1,2\n", "points.csv"),
    "a row too short": text("x,y,z\n1,2,3\n4,5\n", "points.csv"),
    "semicolons": text("x;y;z\n1;2;3\n", "points.csv"),
    "commas for points": text('x,y,z\n"1,5","2,5","3,5"\n', "points.csv"),
    "nan": text("x,y,z\n1,nan,3\n", "points.csv"),
    "infinite": text("x,y,z\n1,inf,3\n", "points.csv"),
    "zeros in between": text(b"x,y,z\n1,\x002,3\n", "points.csv"),
    "utf-16": text("x,y,z\n1,2,3\n".encode("utf-16"), "points.csv"),
    "bytes": text(bytes(range(256)), "points.csv"),
    "a quote that does not end": text('x,y,z\n"1,2,3\n4,5,6\n', "points.csv"),
    "1e400": text("x,y,z\n1e400,2,3\n", "points.csv"),
    "deep json": text("[" * 100000, "points.mrk.json"),
    "empty json": text("{}", "points.mrk.json"),
    "json list": text("[1,2,3]", "points.mrk.json"),
    "no points": text('{"markups": [{"controlPoints": []}]}', "points.mrk.json"),
    "unknown space": text('{"markups":[{"coordinateSystem":"XYZ","controlPoints":[]}]}', "points.mrk.json"),
    "position of two": text('{"markups":[{"controlPoints":[{"position":[1,2]}]}]}', "points.mrk.json"),
    "position of words": text('{"markups":[{"controlPoints":[{"position":["a","b","c"]}]}]}', "points.mrk.json"),
    "never placed": text(
        '{"markups":[{"controlPoints":[{"position":[1,2,3],"positionStatus":"undefined"}]}]}', "points.mrk.json"
    ),
    "fcsv of words": text("# CoordinateSystem = LPS\n1,a,b,c\n", "points.fcsv"),
    "fcsv of another space": text("# CoordinateSystem = IJK\n1,1,2,3\n", "points.fcsv"),
    "a folder": lambda folder: (folder / "points.csv").mkdir() or folder / "points.csv",
}
TFM = "#Insight Transform File V1.0\n#Transform 0\nTransform: {}\nParameters: {}\nFixedParameters: {}\n"
AFFINE_TYPE = "AffineTransform_double_3_3"


def h5(**data: object) -> Fault:
    def write(folder: Path) -> Path:
        with h5py.File(folder / "t.h5", "w") as file:
            for name, value in data.items():
                file.create_dataset(name.replace("__", "/"), data=value)
        return folder / "t.h5"

    return write


def field(array: Callable[[], np.ndarray]) -> Fault:
    def write(folder: Path) -> Path:
        image = nib.Nifti1Image(array(), AFFINE)
        image.header.set_intent("vector")
        nib.save(image, folder / "field.nii.gz")
        return folder / "field.nii.gz"

    return write


ZERO_FIELD = (*SIZE, 1, 3)
DISPLACED, FIXED_H5 = "TransformGroup__0__TransformParameters", "TransformGroup__0__TransformFixedParameters"
TRANSFORMS: dict[str, Fault] = {
    "missing": lambda folder: folder / "t.h5",
    "empty": text("", "t.h5"),
    "empty text": text("", "t.tfm"),
    "text": text("hello\n", "t.txt"),
    "random": text(np.random.default_rng(1).bytes(3000), "t.h5"),
    "h5 of nothing": h5(),
    "h5 of other things": h5(a__b=[1.0, 2.0]),
    "h5 of words": h5(TransformGroup__0__TransformType=[b"Affine"], **{DISPLACED: [b"x"], FIXED_H5: [b"y"]}),
    "h5 too short": h5(
        TransformGroup__0__TransformType=[b"DisplacementFieldTransform_double_3_3"],
        **{DISPLACED: [1.0, 2.0], FIXED_H5: [4.0] * 3 + [0.0] * 3 + [1.0] * 3 + [1.0, 0, 0, 0, 1, 0, 0, 0, 1]},
    ),
    "h5 with nan": h5(
        TransformGroup__0__TransformType=[b"AffineTransform_double_3_3"], **{DISPLACED: [NAN] * 12, FIXED_H5: [0.0] * 3}
    ),
    "eleven numbers": text(TFM.format(AFFINE_TYPE, " ".join(["1"] * 11), "0 0 0"), "t.tfm"),
    "words for numbers": text(TFM.format(AFFINE_TYPE, "a b c", "0 0 0"), "t.tfm"),
    "nan": text(TFM.format(AFFINE_TYPE, "nan 0 0 0 1 0 0 0 1 0 0 0", "0 0 0"), "t.tfm"),
    "infinite": text(TFM.format(AFFINE_TYPE, "inf 0 0 0 1 0 0 0 1 0 0 0", "0 0 0"), "t.tfm"),
    "singular": text(TFM.format(AFFINE_TYPE, "1 0 0 0 1 0 0 0 0 0 0 0", "0 0 0"), "t.tfm"),
    "unknown class": text(TFM.format("WobblyTransform_double_3_3", "1 2 3", "0 0 0"), "t.tfm"),
    "of two dimensions": text(TFM.format("AffineTransform_double_2_2", "1 0 0 1 0 0", "0 0"), "t.tfm"),
    "no fixed parameters": text(TFM.format(AFFINE_TYPE, "1 0 0 0 1 0 0 0 1 0 0 0", ""), "t.tfm"),
    "scan as a field": holding(values, "t.nii.gz"),
    "field with nan": field(lambda: changed(np.zeros(ZERO_FIELD, np.float32), ((0, 0, 0, 0, 0), NAN))),
    "field with infinity": field(lambda: changed(np.zeros(ZERO_FIELD, np.float32), ((0, 0, 0, 0, 0), INF))),
    "field of two": field(lambda: np.zeros((*SIZE, 1, 2), np.float32)),
    "field cut off": cut(field(lambda: np.random.default_rng(0).random(ZERO_FIELD).astype(np.float32)), 0.7),
    "mat of nothing": text(b"", "t.mat"),
    "mat of bytes": text(bytes(range(256)) * 3, "t.mat"),
    "plain matrix of three": text("1 0 0\n0 1 0\n0 0 1\n", "t.txt"),
    "plain matrix": text("1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "t.txt"),
    "matrix with nan": text("nan 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "t.mat"),
    "lta cut off": text("type      = 1\nnxforms   = 1\nmean      = 0 0 0\n", "t.lta"),
    "elastix without a kind": text('(TransformParameters 1 2 3)\n(FixedImageDimension 3)\n', "t.txt"),
    "elastix whose start is missing": text(
        '(Transform "EulerTransform")\n(NumberOfParameters 6)\n(TransformParameters 0 0 0 0 0 0)\n'
        '(InitialTransformParametersFileName "gone.txt")\n(CenterOfRotationPoint 0 0 0)\n'
        "(FixedImageDimension 3)\n(MovingImageDimension 3)\n",
        "t.txt",
    ),
    "elastix in a ring": text(
        '(Transform "EulerTransform")\n(NumberOfParameters 6)\n(TransformParameters 0 0 0 0 0 0)\n'
        '(InitialTransformParametersFileName "t.txt")\n(CenterOfRotationPoint 0 0 0)\n'
        "(FixedImageDimension 3)\n(MovingImageDimension 3)\n",
        "t.txt",
    ),
    "json": text('{"a": 1}', "t.json"),
    "a folder": lambda folder: (folder / "t.h5").mkdir() or folder / "t.h5",
    "pickle": text(pickle.dumps({"matrix": [1, 2]}), "t.pkl"),
}


def weights(edit: Callable[[dict], object], bundle: str = "samconvex") -> Fault:
    def write(folder: Path) -> Path:
        state = torch.load(ROOT / "bundles" / bundle / "models" / "model.pt", weights_only=True)
        torch.save(edit(state), folder / "model.pt")
        return folder / "model.pt"

    return write


def in_first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], dict]:
    def edit(state: dict) -> dict:
        name = next(n for n, v in state.items() if v.is_floating_point())
        return state | {name: change(state[name].clone())}

    return edit


class Runs:
    """What a pickle with code in it does when it is loaded."""

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {RAN}",)


WEIGHTS: dict[str, Fault] = {
    "missing": lambda folder: folder / "model.pt",
    "empty": text(b"", "model.pt"),
    "text": text("weights", "model.pt"),
    "lfs pointer": SCANS["lfs pointer"],
    "cut off": cut(weights(lambda state: state), 0.5),
    "of another network": weights(lambda state: state, "sacb_net"),
    "nan": weights(in_first(lambda w: w.fill_(NAN))),
    "one nan": weights(in_first(lambda w: w.flatten()[:1].fill_(NAN).new_tensor([NAN]).expand(w.numel()).view_as(w))),
    "infinite": weights(in_first(lambda w: w.fill_(INF))),
    "complex": weights(in_first(lambda w: w.to(torch.complex64))),
    "whole numbers": weights(in_first(lambda w: w.long())),
    "another shape": weights(in_first(lambda w: w[None])),
    "one missing": weights(lambda state: dict(list(state.items())[1:])),
    "one too many": weights(lambda state: state | {"more": torch.ones(1)}),
    "a list": weights(lambda state: list(state.values())),
    "a tensor": weights(lambda state: torch.ones(3)),
    "numbers for names": weights(lambda state: dict(enumerate(state.values()))),
    "nested": weights(lambda state: {"model": {"model": state}}),
    "nothing in it": weights(lambda state: {}),
    "code": text(pickle.dumps(Runs()), "model.pt"),
    "a folder": lambda folder: (folder / "model.pt").mkdir() or folder / "model.pt",
    "sparse": weights(in_first(lambda w: w.to_sparse())),
}
PAIRS: dict[str, str | bytes] = {
    "empty": "",
    "a header alone": "fixed,moving\n",
    "no moving": "fixed\n{fixed}\n",
    "unknown column": "fixed,moving,mask\n{fixed},{moving},x\n",
    "a cell missing": "fixed,moving\n{fixed},\n",
    "a file missing": "fixed,moving\n{fixed},gone.nii.gz\n",
    "semicolons": "fixed;moving\n{fixed};{moving}\n",
    "tabs": "fixed\tmoving\n{fixed}\t{moving}\n",
    "utf-16": "fixed,moving\na,b\n".encode("utf-16"),
    "bytes": bytes(range(256)),
    "zeros": b"fixed,moving\n\0\0,\0\n",
    "a quote that does not end": 'fixed,moving\n"{fixed},{moving}\n',
    "a column twice": "fixed,fixed,moving\n{fixed},{fixed},{moving}\n",
    "too many cells": "fixed,moving\n{fixed},{moving},more\n",
    "code": f"fixed,moving\n{{fixed}},$__import__('os').system('touch {RAN}')\n",
    "reference": "fixed,moving\n{fixed},@fixed\n",
    "a long cell": "fixed,moving\n{fixed}," + "x" * 300000 + "\n",
    "an id that climbs": "id,fixed,moving\n../../climbed,gone,{moving}\n",
    "a label missing": "fixed,moving,fixed_label\n{fixed},{moving},gone.nii.gz\n",
}
CASE = {"image": "moving.nii.gz"}
DATASETS: dict[str, object] = {
    "empty": "",
    "not json": "{training: [",
    "a list": [1, 2],
    "a number": 5,
    "null": None,
    "nothing in it": {},
    "no pairs": {"training": [CASE]},
    "training of words": {"training": "abc"},
    "training of numbers": {"training": [1, 2]},
    "cases without an image": {"training": [{"label": "a.nii.gz"}]},
    "image of a number": {"training": [{"image": 5}]},
    "image of nothing": {"training": [{"image": ""}], "registration_pairs": [{"fixed": "a", "moving": "a"}]},
    "unknown ids": {"training": [CASE], "registration_pairs": [{"fixed": "a", "moving": "b"}]},
    "pair without moving": {"training": [CASE], "registration_pairs": [{"fixed": "moving"}]},
    "pairs of words": {"training": [CASE], "registration_pairs": ["a", "b"]},
    "pairs of a number": {"training": [CASE], "registration_pairs": 5},
    "the same id twice": {"training": [CASE, CASE], "registration_pairs": [{"fixed": "x", "moving": "moving"}]},
    "deep": "[" * 100000,
    "a missing file": {"training": ["gone.nii.gz"] * 2, "registration_pairs": [{"fixed": "gone", "moving": "gone"}]},
}


def dataset(content: object) -> Fault:
    def write(folder: Path) -> Path:
        (folder / "data").mkdir()
        (folder / "data" / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return folder / "data"

    return write
