"""Which DICOM series a folder holds, and whether it can be registered; by headers alone."""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from common import InputError
from common.space.dicom import UNEVEN_MM
from common.space.io import LPS_FROM_RAS


class Series(NamedTuple):
    """The headers of a series of slices, in the order of their places along the normal."""

    folder: Path
    headers: list[pydicom.Dataset]

    @property
    def uid(self) -> str:
        return str(self.headers[0].SeriesInstanceUID)

    @property
    def affine_ras(self) -> np.ndarray:
        """4x4 map of (column, row, slice) to RAS mm."""
        first, last = self.headers[0], self.headers[-1]
        places = [np.array(header.ImagePositionPatient, float) for header in (first, last)]
        row, column = np.reshape(np.array(first.ImageOrientationPatient, float), (2, 3))
        between_rows, between_columns = np.array(first.PixelSpacing, float)
        step = (places[1] - places[0]) / (len(self.headers) - 1)
        lps = np.eye(4)
        lps[:3] = np.transpose([row * between_columns, column * between_rows, step, places[0]])
        return LPS_FROM_RAS @ lps


def find_series(folder: str | Path, uid: str = "") -> Series:
    """The one series of slices in a folder and those below it.

    Args:
        folder: holds the DICOM files of one or more studies.
        uid: Series Instance UID, where there are several.

    Raises:
        InputError: no series, several and none named, slices missing, or no frame of reference.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    found = defaultdict(list)
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
        except (InvalidDicomError, OSError):
            continue
        if "ImagePositionPatient" in header and "Rows" in header:
            found[str(header.SeriesInstanceUID)].append(header)
    if not found:
        raise InputError(f"{root}: holds no DICOM series of slices")
    if uid and uid not in found:
        raise InputError(f"{root}: holds no series {uid}, only {', '.join(sorted(found))}")
    if not uid and len(found) > 1:
        told = "; ".join(f"{key} ({each[0].get('SeriesDescription', 'no description')})" for key, each in found.items())
        raise InputError(f"{root}: holds {len(found)} series, name one of them: {told}")
    return Series(root, _in_order(root, found[uid or next(iter(found))]))


def _in_order(root: Path, headers: list[pydicom.Dataset]) -> list[pydicom.Dataset]:
    row, column = np.reshape(np.array(headers[0].ImageOrientationPatient, float), (2, 3))
    normal = np.cross(row, column)
    headers = sorted(headers, key=lambda header: float(normal @ np.array(header.ImagePositionPatient, float)))
    places = np.array([header.ImagePositionPatient for header in headers], float)
    gaps = np.linalg.norm(np.diff(places, axis=0), axis=1)
    if len(headers) < 2:
        raise InputError(f"{root}: must be a 3-D scan, the series has a single slice")
    if np.ptp(gaps) > UNEVEN_MM or gaps.min() < UNEVEN_MM:
        between = f"distances between them are from {gaps.min():.2f} to {gaps.max():.2f} mm"
        raise InputError(f"{root}: slices are missing, double or unevenly spaced, {between}")
    if not headers[0].get("FrameOfReferenceUID"):
        raise InputError(f"{root}: the series has no Frame of Reference UID, so a registration could not refer to it")
    return headers


def refuse_other(folder: Path, series: tuple[Series, Series]) -> None:
    """The results of other series, from folders of the same names, are not replaced.

    Raises:
        InputError: `folder` holds them.
    """
    file = folder / "registration.dcm"
    if not file.exists():
        return
    found = {element.value for element in pydicom.dcmread(file).iterall() if element.keyword == "SeriesInstanceUID"}
    if not {one.uid for one in series} <= found:
        raise InputError(f"{folder}: holds the registration of other series; name another --output")
