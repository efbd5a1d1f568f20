"""DICOM Deformable Spatial Registration: our transform as the object that a hospital's systems keep.

The object takes a point of the Registered frame of reference (the fixed series) to the Source one (the moving series):

    source = post (pre x + offset(x)),  x in LPS mm,

with the offset given on a regular grid whose axes are orthogonal, and matrices before and after it. Our transform is a
displacement field on the working grid, then an affine map, so that it fits without resampling: the field is the grid,
the affine the matrix `post`, and `pre` is left out (identity).

Source: DICOM PS3.3 A.39.2 and C.20.3.1.
"""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DeformableSpatialRegistrationStorage, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import DSfloat
from scipy.ndimage import map_coordinates

from common import InputError, __version__
from common.space import mapping
from common.space.io import LPS_FROM_RAS, replaced

MAKER = "monai-registration-bundles"
OF_THE_PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge", "PatientWeight")
OF_THE_STUDY = ("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName")
NEEDED = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", *OF_THE_STUDY)  # there, if only empty


class Registration(NamedTuple):
    """What an object says: source = post (pre x + offset(x)), everything in LPS mm."""

    pre: np.ndarray  # 4x4
    offset: np.ndarray  # (3, I, J, K), float32
    grid: np.ndarray  # 4x4, index (i, j, k) -> LPS mm
    post: np.ndarray  # 4x4

    def map_points(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 3) of the fixed frame of reference in the moving one; the offset is 0 beyond the grid."""
        x = np.c_[points, np.ones(len(points))]
        index = (x @ np.linalg.inv(self.grid).T)[:, :3].T
        offset = [map_coordinates(part.astype(np.float64), index, order=1, mode="constant") for part in self.offset]
        moved = x @ self.pre.T
        moved[:, :3] += np.transpose(offset)
        return (moved @ self.post.T)[:, :3]


def registration_of(transform: mapping.Transform, size: tuple[int, int, int], affine_ras: np.ndarray) -> Registration:
    """A transform as such an object holds it; exactly, if it is a displacement field followed by linear maps.

    Args:
        transform: fixed -> moving.
        size, affine_ras: of the fixed scan; the grid on which any other transform is sampled.
    """
    field, *rest = mapping.parts(transform)
    post = np.eye(4)
    if isinstance(field.parts[0], mapping.Field) and all(part.linear for part in rest):
        disp, affine_ras = mapping.field_of(field)
        post = mapping.matrix_of(mapping.compose(*rest)) if rest else post
    else:
        disp = mapping.disp_of(transform, size, affine_ras)
    grid = LPS_FROM_RAS @ affine_ras
    offset = np.einsum("ab,bijk->aijk", grid[:3, :3], disp)
    if np.linalg.det(grid[:3, :3]) < 0:  # the third axis of the object is the cross product of the first two
        last = np.eye(4)
        last[2, 2:] = -1, offset.shape[3] - 1
        grid, offset = grid @ last, offset[..., ::-1]
    post = LPS_FROM_RAS @ post @ LPS_FROM_RAS
    return Registration(np.eye(4), np.ascontiguousarray(offset, np.float32), grid, post)


def write_dsro(
    registration: Registration, fixed: Sequence[Dataset], moving: Sequence[Dataset], path: str | Path
) -> None:
    """Write the object, into the patient and study of the fixed series.

    Args:
        fixed, moving: headers of the slices of the two series.
        path: file to write.

    Raises:
        InputError: a series has no frame of reference, or the file cannot be written.
    """
    for name, series in (("fixed", fixed), ("moving", moving)):
        if not series[0].get("FrameOfReferenceUID"):
            raise InputError(f"{path}: the {name} series has no Frame of Reference UID")
    instance = generate_uid()
    data = FileDataset(None, {}, file_meta=_file_meta(instance), preamble=b"\0" * 128)
    now = datetime.datetime.now()
    _identify(data, fixed[0], now)
    data.SOPClassUID, data.SOPInstanceUID = DeformableSpatialRegistrationStorage, instance
    data.Modality, data.SeriesInstanceUID, data.SeriesNumber, data.InstanceNumber = "REG", generate_uid(), 1, 1
    data.SeriesDescription, data.Laterality = "Deformable registration", ""  # type 2C, of no meaning here
    data.FrameOfReferenceUID = fixed[0].FrameOfReferenceUID
    data.PositionReferenceIndicator = fixed[0].get("PositionReferenceIndicator", "")
    data.ContentDate, data.ContentTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    data.ContentLabel, data.ContentDescription = "REGISTRATION", "fixed frame of reference to moving, deformable"
    data.ContentCreatorName = ""
    data.DeformableRegistrationSequence = [_item(fixed, None), _item(moving, registration)]
    _refer(data, fixed, moving)
    replaced(path, lambda partial: data.save_as(partial, enforce_file_format=True))


def _file_meta(instance: str) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DeformableSpatialRegistrationStorage
    meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = instance, ExplicitVRLittleEndian
    return meta


def _identify(data: Dataset, header: Dataset, now: datetime.datetime) -> None:
    """Patient and study of a series, and the equipment: this software."""
    data.SpecificCharacterSet = header.get("SpecificCharacterSet", "ISO_IR 192")
    for name in (*OF_THE_PATIENT, *OF_THE_STUDY):
        if name in header or name in NEEDED:
            setattr(data, name, header.get(name, ""))
    data.InstanceCreationDate, data.InstanceCreationTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    data.SeriesDate, data.SeriesTime = data.InstanceCreationDate, data.InstanceCreationTime
    data.Manufacturer = data.ManufacturerModelName = MAKER
    data.DeviceSerialNumber, data.SoftwareVersions = "0", __version__


def _item(series: Sequence[Dataset], registration: Registration | None) -> Dataset:
    """One series in the Deformable Registration Sequence; the fixed one, without a transform, is where it is."""
    item = Dataset()
    item.SourceFrameOfReferenceUID = series[0].FrameOfReferenceUID
    item.ReferencedImageSequence = _references(series)
    item.RegistrationTypeCodeSequence = []
    if registration is None:
        return item
    for name, matrix in (("Pre", registration.pre), ("Post", registration.post)):
        if not np.array_equal(matrix, np.eye(4)):
            part = Dataset()
            part.FrameOfReferenceTransformationMatrixType = _kind(matrix)
            part.FrameOfReferenceTransformationMatrix = _decimals(matrix)
            setattr(item, f"{name}DeformationMatrixRegistrationSequence", [part])
    spacing = np.linalg.norm(registration.grid[:3, :3], axis=0)
    grid = Dataset()
    grid.ImageOrientationPatient = _decimals((registration.grid[:3, :2] / spacing[:2]).T)
    grid.ImagePositionPatient = _decimals(registration.grid[:3, 3])
    grid.GridDimensions, grid.GridResolution = list(registration.offset.shape[1:]), spacing.tolist()
    grid.VectorGridData = np.transpose(registration.offset, (3, 2, 1, 0)).astype("<f4").tobytes()  # i fastest, then j
    item.DeformableRegistrationGridSequence = [grid]
    return item


def _decimals(values: np.ndarray) -> list[DSfloat]:
    """As DICOM's decimal strings, of up to 16 characters."""
    return [DSfloat(value, auto_format=True) for value in values.ravel().tolist()]


def _kind(matrix: np.ndarray) -> str:
    """RIGID, RIGID_SCALE or AFFINE."""
    product = matrix[:3, :3].T @ matrix[:3, :3]
    if np.allclose(product, np.eye(3), atol=1e-6):
        return "RIGID"
    return "RIGID_SCALE" if np.allclose(product, np.diag(np.diag(product)), atol=1e-6) else "AFFINE"


def _references(series: Sequence[Dataset]) -> list[Dataset]:
    found = []
    for header in series:
        reference = Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
        found.append(reference)
    return found


def _refer(data: Dataset, fixed: Sequence[Dataset], moving: Sequence[Dataset]) -> None:
    """All referenced instances by series, those of other studies apart."""
    own, other = [], []
    for series in (fixed, moving):
        reference = Dataset()
        reference.SeriesInstanceUID = series[0].SeriesInstanceUID
        reference.ReferencedInstanceSequence = _references(series)
        if series[0].StudyInstanceUID == data.StudyInstanceUID:
            own.append(reference)
            continue
        study = Dataset()
        study.StudyInstanceUID, study.ReferencedSeriesSequence = series[0].StudyInstanceUID, [reference]
        other.append(study)
    data.ReferencedSeriesSequence = own
    if other:
        data.StudiesContainingOtherReferencedInstancesSequence = other


def read_dsro(path: str | Path) -> Registration:
    """Read the deformation of such an object back: that of its item with a grid.

    Raises:
        InputError: not such an object, or it has no grid.
    """
    data = dcmread(path)
    items = [i for i in data.get("DeformableRegistrationSequence", []) if i.get("DeformableRegistrationGridSequence")]
    if data.get("SOPClassUID") != DeformableSpatialRegistrationStorage or not items:
        raise InputError(f"{path}: not a DICOM Deformable Spatial Registration with a grid")
    matrices = []
    for name in ("Pre", "Post"):
        (part,) = items[0].get(f"{name}DeformationMatrixRegistrationSequence") or [None]
        values = np.eye(4) if part is None else part.FrameOfReferenceTransformationMatrix
        matrices.append(np.array(values, float).reshape(4, 4))
    (stored,) = items[0].DeformableRegistrationGridSequence
    row, column = np.reshape(np.array(stored.ImageOrientationPatient, float), (2, 3))
    grid = np.eye(4)
    grid[:3, :3] = np.transpose([row, column, np.cross(row, column)]) * np.array(stored.GridResolution, float)
    grid[:3, 3] = np.array(stored.ImagePositionPatient, float)
    flat = np.frombuffer(stored.VectorGridData, "<f4")
    offset = np.transpose(flat.reshape(*reversed(list(stored.GridDimensions)), 3))
    return Registration(matrices[0], offset, grid, matrices[1])
