"""MONAI Deploy operators: register two images with a bundle, and write the result as a DICOM object.

Need the MONAI Deploy App SDK.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from common import InputError
from common.run.registrar import Registrar
from common.space import io
from common.space.transform_files import read_transform

try:
    from monai.deploy.core import ConditionType, Fragment, Image, Operator, OperatorSpec

    from common.deploy import dsro
except ImportError as error:
    text = f"the MONAI Deploy App SDK cannot be used here ({error}); common/deploy/README.md says how to install"
    raise ImportError(text) from error


class RegisterOperator(Operator):
    """Register one image to another: what `monai.bundle run` does, with the same options and files.

    Named inputs: "fixed" and "moving", `Image` with their affine (RAS), as DICOMSeriesToVolumeOperator gives them.
    Named output: "folder", a Path with warped.nii.gz, transform.h5, displacement.nii.gz, report.json, report.png.

    Args:
        registrar: the bundle.
        output_dir: where the pair's folder is made.
        names: of the moving and of the fixed image; the folder is called MOVING_to_FIXED.
        affines: by role, (column, row, slice) -> RAS mm, as `Series.affine_ras` of the headers; else those of the
            images count, which SDK 4.0.0 gets wrong where rows and columns are spaced differently.
        options: further ones of the bundle, as {"refine_steps": 20}.
    """

    def __init__(
        self,
        fragment: Fragment,
        *args: Any,
        registrar: Registrar,
        output_dir: str | Path,
        names: tuple[str, str] = ("moving", "fixed"),
        affines: dict[str, np.ndarray] | None = None,
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.registrar, self.output_dir, self.names = registrar, output_dir, names
        self.affines, self.bundle_options = affines or {}, options or {}
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        spec.input("fixed")
        spec.input("moving")
        spec.output("folder").condition(ConditionType.NONE)  # works without a receiver

    def compute(self, op_input, op_output, context) -> None:
        with tempfile.TemporaryDirectory() as place:
            files = []
            for role, name in zip(("moving", "fixed"), self.names):
                files.append(Path(place, role, f"{name}.nrrd"))  # holds the affine in double precision
                files[-1].parent.mkdir()
                io.write_scan(*scan_of(op_input.receive(role), self.affines.get(role)), files[-1])
            folder = self.registrar.register(*files, self.output_dir, verbose=True, **self.bundle_options).folder
        op_output.emit(folder, "folder")


def scan_of(image: Image, affine: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The SDK's image, slices first, as (I, J, K) float32 and `affine_ras`: the given one, else the image's own.

    Raises:
        InputError: it has no affine, or says that it is in LPS.
    """
    meta = image.metadata()
    values = np.transpose(image.asnumpy()).astype(np.float32)
    if affine is not None:
        return values, affine
    affine = meta.get("affine", meta.get("nifti_affine_transform"))
    if affine is None or meta.get("space", "RAS") != "RAS":
        raise InputError("an image needs its affine, in RAS, in the metadata; leave affine_lps_to_ras as it is")
    return values, np.asarray(affine, np.float64)


class RegistrationWriterOperator(Operator):
    """Add registration.dcm, a DICOM Deformable Spatial Registration, to the folder of a pair.

    Named inputs: "folder" of `RegisterOperator`; "fixed_series" and "moving_series", as DICOMSeriesSelectorOperator
    gives them: lists of StudySelectedSeries of which the first series counts.
    """

    def setup(self, spec: OperatorSpec) -> None:
        for name in ("folder", "fixed_series", "moving_series"):
            spec.input(name)

    def compute(self, op_input, op_output, context) -> None:
        folder = op_input.receive("folder")
        headers = []
        for name in ("fixed_series", "moving_series"):
            series = op_input.receive(name)[0].selected_series[0].series
            headers.append([instance.get_native_sop_instance() for instance in series.get_sop_instances()])
        warped, affine = io.read_scan(folder / "warped.nii.gz")
        registration = dsro.registration_of(read_transform(folder / "transform.h5"), warped.shape[1:], affine)
        dsro.write_dsro(registration, *headers, folder / "registration.dcm")


def rules_for(uid: str) -> str:
    """Selection rules, for the SDK's selector, of exactly this series."""
    conditions = {"SeriesInstanceUID": f"^{uid.replace('.', '[.]')}$"}
    return json.dumps({"selections": [{"name": "the series", "conditions": conditions}]})
