"""ITK's classes as `itk` itself gives them, without the libraries that it would load on the way."""

import subprocess
import sys
from pathlib import Path

import itk
import numpy as np

from common.space import itk_classes

ROOT = Path(__file__).resolve().parents[3]
WITHOUT = """
import sys
import numpy as np
from pathlib import Path
from common.space import geometry, mapping
affine = np.diag([2.0, 2.0, 2.0, 1.0])
image = np.random.default_rng(0).random((1, 12, 10, 8), dtype=np.float32)
geometry.to_working_grid(image, affine, (6, 5, 4), np.diag([4.0, 4.0, 4.0, 1.0]))
field = mapping.displacement_transform(np.ones((3, 12, 10, 8)), affine)
mapping.write_transform(mapping.compose(field, mapping.affine_transform(np.eye(4))), "t.h5")
mapping.displacement_image(mapping.read_transform("t.h5"), (6, 5, 4), affine)
print([name for name in sys.modules if name.endswith("_ITKImageIntensityPython")])
"""


def test_the_large_library_is_not_loaded(tmp_path: Path) -> None:
    """Every run would pay ten seconds for it: from scan to working grid, and to the files of a transform."""
    line = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{WITHOUT}"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_they_are_the_classes_of_itk() -> None:
    image = itk.Image[itk.F, 3]
    vectors = itk.Image[itk.Vector[itk.F, 3], 3]
    assert itk_classes.displacement_field_transform() is itk.DisplacementFieldTransform[itk.D, 3]
    assert itk_classes.wrapped("ResampleImageFilter", "IF3IF3") is itk.ResampleImageFilter[image, image]
    assert itk_classes.wrapped("DiscreteGaussianImageFilter", "IF3IF3") is itk.DiscreteGaussianImageFilter[image, image]
    found = itk_classes.wrapped("TransformToDisplacementFieldFilter", "IVF33D")
    assert found is itk.TransformToDisplacementFieldFilter[vectors, itk.D]


def test_files_are_those_of_itk(tmp_path: Path) -> None:
    """Each reads what the other has written; the transforms come in the order of the file, as their own classes."""
    matrix = itk.AffineTransform[itk.D, 3].New()
    matrix.SetTranslation([1.0, 2.0, 3.0])
    turn = itk.Euler3DTransform[itk.D].New()
    turn.SetRotation(0.1, 0.2, 0.3)
    for ending in ("h5", "tfm"):
        ours, theirs = str(tmp_path / f"ours.{ending}"), str(tmp_path / f"theirs.{ending}")
        itk_classes.write_transforms([matrix, turn], ours)
        itk.transformwrite([matrix, turn], theirs)
        for found in (itk.transformread(ours), itk_classes.read_transforms(theirs)):
            assert [part.GetNameOfClass() for part in found] == ["AffineTransform", "Euler3DTransform"]
            for part, original in zip(found, (matrix, turn)):
                np.testing.assert_allclose(
                    part.TransformPoint([7.0, 8.0, 9.0]), original.TransformPoint([7.0, 8.0, 9.0])
                )
