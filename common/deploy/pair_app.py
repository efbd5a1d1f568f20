"""The app: two DICOM series in; out the bundle's files and a DICOM registration object. Needs the Deploy App SDK."""

import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import InputError
from common.deploy.operators import RegisterOperator, RegistrationWriterOperator, rules_for
from common.deploy.series import Series, find_series, refuse_other
from common.run.cli import bundle_folder, sentence_of
from common.run.registrar import Registrar
from common.space import io

from monai.deploy.conditions import CountCondition  # isort: skip
from monai.deploy.core import Application  # isort: skip
from monai.deploy.operators.dicom_data_loader_operator import DICOMDataLoaderOperator  # isort: skip
from monai.deploy.operators.dicom_series_selector_operator import DICOMSeriesSelectorOperator  # isort: skip
from monai.deploy.operators.dicom_series_to_volume_operator import DICOMSeriesToVolumeOperator  # isort: skip


class PairApplication(Application):
    """Load, select and convert a series for each role; register; write the DICOM object.

    Args:
        fixed, moving: the series.
        registrar: the bundle.
        output_dir: folder for the pair's folder.
        options: of the bundle.
    """

    def __init__(
        self, fixed: Series, moving: Series, registrar: Registrar, output_dir: Path, options: dict[str, Any]
    ) -> None:
        self.series = {"fixed": fixed, "moving": moving}
        self.registrar, self.output_dir, self.bundle_options = registrar, output_dir, options
        super().__init__([sys.executable])  # the host would look for options of its own on our command line

    def compose(self) -> None:
        names = (self.series["moving"].folder.absolute().name, self.series["fixed"].folder.absolute().name)
        common = {"registrar": self.registrar, "output_dir": self.output_dir, "options": self.bundle_options}
        affines = {role: series.affine_ras for role, series in self.series.items()}
        register = RegisterOperator(self, name="register", names=names, affines=affines, **common)
        writer = RegistrationWriterOperator(self, name="writer")
        for role, series in self.series.items():
            loader = DICOMDataLoaderOperator(
                self, CountCondition(self, 1), input_folder=series.folder.absolute(), name=f"{role}_loader"
            )
            rules = rules_for(series.uid)
            selector = DICOMSeriesSelectorOperator(self, rules=rules, name=f"{role}_selector")
            volume = DICOMSeriesToVolumeOperator(self, name=f"{role}_volume")
            self.add_flow(loader, selector, {("dicom_study_list", "dicom_study_list")})
            self.add_flow(selector, volume, {("study_selected_series_list", "study_selected_series_list")})
            self.add_flow(volume, register, {("image", role)})
            self.add_flow(selector, writer, {("study_selected_series_list", f"{role}_series")})
        self.add_flow(register, writer, {("folder", "folder")})


def run_pair(
    fixed: str,
    moving: str,
    bundle: str,
    output: str,
    *,
    fixed_series: str = "",
    moving_series: str = "",
    **options: Any,
) -> Path:
    """Register two DICOM series; the results appear in OUTPUT/MOVING_to_FIXED, whole or not at all.

    Args:
        fixed, moving: folders, each with one series of slices.
        bundle: name of a bundle of the repository, or its folder.
        output: folder for the pair's folder.
        fixed_series, moving_series: Series Instance UIDs, where a folder holds several.
        options: of the bundle.

    Raises:
        InputError: what is wrong with a folder, a scan or an option.
    """
    registrar = Registrar(bundle_folder(bundle))
    series = find_series(fixed, fixed_series), find_series(moving, moving_series)
    if series[0].uid == series[1].uid:
        raise InputError(f"{moving}: holds the fixed series itself, {series[0].uid}")
    target = io.output_folder(output)
    with tempfile.TemporaryDirectory(dir=target, prefix=".pair_") as place:
        try:
            PairApplication(*series, registrar, Path(place), options).run()
        except Exception as error:
            if sentence := sentence_of(error):
                raise InputError(sentence) from error
            raise
        made = next((path for path in Path(place).iterdir() if (path / "registration.dcm").exists()), None)
        if made is None:
            raise RuntimeError("the application ended without its result; its log above says why")
        name = made.name
        refuse_other(target / name, series)
        io.write_folder(target / name, {path.name: partial(shutil.move, path) for path in sorted(made.iterdir())})
    return target / name
