"""Transforms to and from ITK's own, for the files and the kinds of transform that only ITK knows."""

import itk
import numpy as np

from common.space import itk_classes
from common.space.io import LPS_FROM_RAS, affine_of, set_geometry, to_itk
from common.space.mapping import Affine, Field, Foreign, Transform


def from_itk(transform: "itk.Transform") -> Transform:
    """What ITK has read as a transform of ours: linear ones as a matrix, composites as their parts."""
    if isinstance(transform, itk.CompositeTransform[itk.D, 3]):
        queue = [itk_classes.down_cast(transform.GetNthTransform(n)) for n in range(transform.GetNumberOfTransforms())]
        return Transform(tuple(part for member in reversed(queue) for part in from_itk(member).parts))
    if transform.IsLinear():
        return Transform((Affine(_matrix_of(transform)),))
    if isinstance(transform, itk_classes.displacement_field_transform()):
        field = transform.GetDisplacementField()
        affine = affine_of(field)
        linear = np.linalg.inv((LPS_FROM_RAS @ affine)[:3, :3])
        vectors = np.asarray(itk.array_view_from_image(field), np.float64)
        return Transform((Field(np.einsum("ab,kjib->aijk", linear, vectors), affine),))
    return Transform((Foreign(transform),))


def _matrix_of(transform: "itk.Transform") -> np.ndarray:
    corners = np.vstack([np.zeros(3), np.eye(3)]).tolist()
    there = np.array([transform.TransformPoint(point) for point in corners])
    lps = np.eye(4)
    lps[:3, :3], lps[:3, 3] = (there[1:] - there[0]).T, there[0]
    return LPS_FROM_RAS @ lps @ LPS_FROM_RAS


def to_itk_transform(transform: Transform) -> "itk.Transform":
    """The same as ITK's composite, or as its only part."""
    members = [_part_to_itk(part) for part in transform.parts]
    if len(members) == 1:
        return members[0]
    whole = itk.CompositeTransform[itk.D, 3].New()
    for member in reversed(members):
        whole.AddTransform(member)
    return whole


def _part_to_itk(part: Affine | Field | Foreign) -> "itk.Transform":
    if isinstance(part, Foreign):
        return part.itk
    if isinstance(part, Affine):
        lps = LPS_FROM_RAS @ part.matrix @ LPS_FROM_RAS
        affine = itk.AffineTransform[itk.D, 3].New()
        affine.SetMatrix(itk.matrix_from_array(np.ascontiguousarray(lps[:3, :3])))
        affine.SetTranslation(lps[:3, 3].tolist())
        return affine
    linear = (LPS_FROM_RAS @ part.affine_ras)[:3, :3]
    field = itk.Image[itk.Vector[itk.D, 3], 3].New()
    field.SetRegions([int(n) for n in part.disp.shape[1:]])
    field.Allocate()
    vectors = np.einsum("ab,bijk->kjia", linear, part.disp.astype(np.float64))  # ITK: k slowest, components last
    itk.array_view_from_image(field)[...] = vectors
    set_geometry(field, part.affine_ras)
    transform = itk_classes.displacement_field_transform().New()
    transform.SetDisplacementField(field)
    return transform


def field_on(transform: Transform, size: tuple[int, int, int], affine_ras: np.ndarray) -> Field:
    """The whole map as a displacement on a grid, exact at its voxels, by ITK."""
    reference = to_itk(np.zeros((1, 1, 1), np.float32), affine_ras)
    source = itk_classes.wrapped("TransformToDisplacementFieldFilter", "IVF33D").New()
    source.SetTransform(to_itk_transform(transform))
    source.SetSize([int(n) for n in size])
    source.SetOutputSpacing(reference.GetSpacing())
    source.SetOutputOrigin(reference.GetOrigin())
    source.SetOutputDirection(reference.GetDirection())
    source.Update()
    vectors = np.asarray(itk.array_from_image(source.GetOutput()), np.float64)
    linear = np.linalg.inv((LPS_FROM_RAS @ affine_ras)[:3, :3])
    return Field(np.einsum("ab,kjib->aijk", linear, vectors), affine_ras)
