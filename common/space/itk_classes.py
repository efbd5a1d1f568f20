"""Classes of ITK straight from the modules that wrap them.

`itk.NAME` first loads every library on which the class's own one may depend: ten seconds of CPU for
DisplacementFieldTransform, the transform files or the Gaussian, most of it ITKImageIntensity (137 MB), of which none of
them needs anything. The class is the same.
"""

import functools
import importlib
from typing import Any

import itk


def wrapped(name: str, instance: str) -> Any:
    """ITK class `name` for the types of `instance`, as the wrappers abbreviate them: D double, F float, I image."""
    return getattr(importlib.import_module(f"itk.itk{name}Python"), f"itk{name}{instance}")


def displacement_field_transform() -> Any:
    """itk.DisplacementFieldTransform[itk.D, 3]."""
    return wrapped("DisplacementFieldTransform", "D3")


def down_cast(transform: "itk.Transform") -> "itk.Transform":
    """itk.down_cast, which would look the class up in `itk`."""
    if transform.GetNameOfClass() == "DisplacementFieldTransform":
        return displacement_field_transform().cast(transform)
    return itk.down_cast(transform)


def read_transforms(path: str) -> list["itk.Transform"]:
    """itk.transformread: the transforms of a file, in its order."""
    _register_formats()
    reader = _file_class("Reader").New()
    reader.SetFileName(path)
    reader.Update()
    found = reader.GetModifiableTransformList()
    transforms = []
    while not found.empty():
        transforms.insert(0, down_cast(found.pop()))
    return transforms


def write_transforms(transforms: list["itk.Transform"], path: str) -> None:
    """itk.transformwrite, compressed."""
    _register_formats()
    writer = _file_class("Writer").New()
    writer.SetFileName(path)
    writer.SetUseCompression(True)
    for transform in transforms:
        writer.AddTransform(transform)
    writer.Update()


def _file_class(which: str) -> Any:
    return getattr(importlib.import_module(f"itk.itkTransformFile{which}Python"), f"itkTransformFile{which}TemplateD")


@functools.cache
def _register_formats() -> None:
    """The readers and writers of transform files, which ITK finds by a list that its own loading fills."""
    for name in ("HDF5", "Txt", "Matlab"):
        module = importlib.import_module(f"itk.itk{name}TransformIOPython")
        getattr(module, f"itk{name}TransformIOFactory").RegisterOneFactory()
