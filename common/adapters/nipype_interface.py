"""A node of nipype: `python -m common register` as an interface."""

import json
import os
import sys
from pathlib import Path

from nipype.interfaces.base import (
    CommandLine,
    CommandLineInputSpec,
    Directory,
    File,
    TraitedSpec,
    traits,
)

OUT = "registration"  # folder of the results in that of the node
OF_PAIR = {
    "warped_image": "warped.nii.gz",
    "transform": "transform.h5",
    "inverse_transform": "inverse_transform.h5",
    "displacement": "displacement.nii.gz",
    "warped_label": "warped_label.nii.gz",
    "report": "report.json",
}


def _scan(what: str, **more: bool) -> File:
    return File(exists=True, desc=what, **more)


class RegisterInputSpec(CommandLineInputSpec):
    """The options of `monai-register` by their names; `args` takes those that are not here."""

    moving = _scan("the scan that is brought to the fixed one", argstr="--moving=%s", mandatory=True)
    fixed = _scan("the scan whose space the result has", argstr="--fixed=%s", mandatory=True)
    method = traits.Str("auto", desc="auto, or a bundle", argstr="--method=%s", usedefault=True)
    moving_label = _scan("label map of the moving scan", argstr="--moving_label=%s")
    fixed_label = _scan("label map of the fixed scan", argstr="--fixed_label=%s")
    moving_mask = _scan("mask of the moving scan", argstr="--moving_mask=%s")
    fixed_mask = _scan("mask of the fixed scan", argstr="--fixed_mask=%s")
    refine_steps = traits.Range(low=0, desc="steps of the refinement", argstr="--refine_steps=%d")
    prealign = traits.Enum("affine", "rigid", "none", desc="the first alignment", argstr="--prealign=%s")
    save_inverse = traits.Bool(desc="write the inverse as well", argstr="--save_inverse=%s")
    device = traits.Str(desc="where to compute, as cpu or cuda:0", argstr="--device=%s")
    output_dir = Directory(OUT, desc="folder of the results", argstr="--output_dir=%s", usedefault=True)


class RegisterOutputSpec(TraitedSpec):
    """Files of the pair, and what its report says."""

    warped_image = File(exists=True, desc="moving scan on the fixed grid")
    transform = File(exists=True, desc="of fixed points to the moving scan: ITK composite, for antsApplyTransforms too")
    inverse_transform = File(desc="its inverse, if save_inverse")
    displacement = File(desc="the same in mm, of small scans")
    warped_label = File(desc="label map on the fixed grid, if moving_label")
    report = File(exists=True, desc="measures and warnings")
    verdict = traits.Enum("plausible", "doubtful", desc="of the report")


class Register(CommandLine):
    """Deformable registration by a MONAI bundle.

    >>> node = Node(Register(moving="t1.nii.gz", fixed="template.nii.gz"), name="register")  # doctest: +SKIP
    """

    _cmd = f"{sys.executable} -m common register"
    input_spec = RegisterInputSpec
    output_spec = RegisterOutputSpec

    def _list_outputs(self) -> dict:
        folder = Path(os.path.abspath(self.inputs.output_dir))
        (report,) = folder.glob("*/report.json")
        found = {name: report.parent / file for name, file in OF_PAIR.items()}
        outputs = self.output_spec().get() | {name: str(path) for name, path in found.items() if path.is_file()}
        outputs["verdict"] = json.loads(report.read_text(encoding="utf-8"))["verdict"]
        return outputs
