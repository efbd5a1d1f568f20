"""Synthetic DICOM series, for tests of what reads and writes DICOM."""

from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from common.space.io import LPS_FROM_RAS


def write_series(
    scan: np.ndarray, affine_ras: np.ndarray, folder: Path, *, patient: str, description: str, study: str = ""
) -> str:
    """Write a scan (I, J, K) of whole numbers as CT slices, last axis through the slices; gives its UID.

    The axes of `affine_ras` must be orthogonal and right-handed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lps = LPS_FROM_RAS @ affine_ras
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / spacing
    assert np.linalg.det(axes) > 0.999
    series, study, frame = generate_uid(), study or generate_uid(), generate_uid()
    for k in range(scan.shape[2]):
        instance = generate_uid()
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, instance
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, instance
        data.PatientName, data.PatientID, data.PatientBirthDate, data.PatientSex = "Test^Phantom", patient, "", "O"
        data.StudyInstanceUID, data.StudyID, data.StudyDate, data.StudyTime = study, "1", "20260101", "120000"
        data.AccessionNumber = data.ReferringPhysicianName = ""
        data.SeriesInstanceUID, data.SeriesNumber, data.SeriesDescription = series, 1, description
        data.SeriesDate, data.SeriesTime = "20260101", "120000"
        data.FrameOfReferenceUID, data.PositionReferenceIndicator = frame, ""
        data.Modality, data.Manufacturer, data.ImageType = "CT", "none", ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.InstanceNumber, data.PatientPosition = k + 1, "HFS"
        data.ImageOrientationPatient = [f"{v:.10f}" for v in axes[:, :2].T.ravel()]
        data.ImagePositionPatient = [f"{v:.8f}" for v in (lps @ [0, 0, k, 1])[:3]]
        data.PixelSpacing = [f"{spacing[1]:.8f}", f"{spacing[0]:.8f}"]  # between rows, then between columns
        data.SliceThickness = f"{spacing[2]:.8f}"
        data.Columns, data.Rows = scan.shape[:2]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleIntercept, data.RescaleSlope, data.RescaleType = "0", "1", "HU"
        data.PixelData = np.rint(scan[:, :, k].T).astype("<i2").tobytes()
        data.save_as(folder / f"slice_{k:03d}.dcm", enforce_file_format=True)
    return series
