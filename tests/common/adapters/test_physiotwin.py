"""physiotwin4d's class: its two transforms warp as its page says, from a start too, and its chain takes us."""

import itk
import numpy as np
import pytest
from people import SPACING, write_person

pytest.importorskip("physiotwin4d", reason="physiotwin4d is not installed; it brings TotalSegmentator, VTK and USD")

from physiotwin4d import RegisterImagesBase, TransformTools  # noqa: E402

from common.adapters.physiotwin import RegisterImagesBundle  # noqa: E402

OPTIONS = {"features": "mind", "spacing": SPACING, "device": "cpu"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list:
    folder = tmp_path_factory.mktemp("people")
    return [itk.imread(str(write_person(folder, f"p{seed}", seed)), itk.F) for seed in range(2)]


def similarity(one: itk.Image, other: itk.Image) -> float:
    return float(np.corrcoef(*(itk.array_from_image(image).ravel() for image in (one, other)))[0, 1])


def test_both_ways(images: list) -> None:
    moving, fixed = images
    registrar = RegisterImagesBundle("samconvex", **OPTIONS)
    assert isinstance(registrar, RegisterImagesBase)
    registrar.set_modality("mri")
    registrar.set_fixed_image(fixed)
    found = registrar.register(moving)
    tools, identity = TransformTools(), itk.IdentityTransform[itk.D, 3].New()
    before = similarity(tools.transform_image(moving, identity, fixed), fixed)
    after = similarity(registrar.get_registered_image(), fixed)
    assert after > before + 0.1 and 0 < found["loss"] < 1 - before
    back = similarity(tools.transform_image(fixed, found["inverse_transform"], moving), moving)
    assert back > similarity(tools.transform_image(fixed, identity, moving), moving) + 0.1
    point = [3.0, -4.0, 5.0]
    returned = found["inverse_transform"].TransformPoint(found["forward_transform"].TransformPoint(point))
    assert np.linalg.norm(np.subtract(returned, point)) < 0.5
    again = registrar.register_from(found["forward_transform"], moving)
    assert similarity(registrar.get_registered_image(), fixed) > after - 0.02 and np.isfinite(again["loss"])


def test_masks_and_mistakes(images: list) -> None:
    moving, fixed = images
    registrar = RegisterImagesBundle("samconvex", **OPTIONS)
    with pytest.raises(ValueError, match="Fixed image must be set"):
        registrar.registration_method(moving)
    registrar.set_modality("mri")
    registrar.set_fixed_image(fixed)
    mask = itk.image_from_array((itk.array_from_image(fixed) > 0).astype(np.uint8))
    mask.CopyInformation(fixed)
    registrar.set_fixed_mask(mask)
    assert np.isfinite(registrar.register(moving)["loss"])
