"""ITK's classes as `itk` itself gives them, without the libraries that it would load on the way."""

from pathlib import Path

import itk
import numpy as np

from common.space import itk_classes


def test_they_are_the_classes_of_itk() -> None:
    vectors = itk.Image[itk.Vector[itk.F, 3], 3]
    assert itk_classes.displacement_field_transform() is itk.DisplacementFieldTransform[itk.D, 3]
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
