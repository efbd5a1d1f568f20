"""Registration inside a `Compose` of MONAI: the embedded pair, from files to what the next transform gets."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.blocks import Warp
from monai.transforms import Compose, CopyItemsd, LoadImaged, SaveImaged, ScaleIntensityd

from common import InputError, fields
from common.ops import warp
from common.run.cli import sentence_of
from common.run.example import write_phantom
from common.run.transforms import RegisterDeformabled
from common.space import io, mapping

OPTIONS = {"features": "mind", "device": "cpu", "surface": False}  # needs no weights
SCANS, LABELS = ["moving", "fixed"], ["moving_label", "fixed_label"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_phantom(tmp_path_factory.mktemp("phantom") / "pair")


def places_of(scan: MetaTensor) -> MetaTensor:
    """(3, I, J, K): where each voxel is, in RAS mm."""
    voxels = fields.identity(scan.shape[1:], scan)[0].double()
    places = torch.einsum("ab,bijk->aijk", scan.affine[:3, :3], voxels) + scan.affine[:3, 3, None, None, None]
    return MetaTensor(places, affine=scan.affine)


@pytest.fixture(scope="module")
def found(pair: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict:
    steps = [
        LoadImaged([*SCANS, *LABELS], ensure_channel_first=True),
        ScaleIntensityd(SCANS),
        CopyItemsd("moving_label", names="twin"),
        lambda data: data | {"places": places_of(data["moving"])},
        RegisterDeformabled(along=("moving", "places", "twin"), mode=("bilinear", "bilinear", "nearest"), **OPTIONS),
        SaveImaged("warped", output_dir=tmp_path_factory.mktemp("saved"), print_log=False, savepath_in_metadict=True),
    ]
    return Compose(steps)(pair)


def test_the_next_transform_gets_it(found: dict, pair: dict[str, str]) -> None:
    """On the grid of the fixed scan, named after the file that it was made from; the scans themselves as they were."""
    fixed = found["fixed"]
    for name, channels in {"warped": 1, "disp": 3, "warped_label": 1, "warped_moving": 1, "warped_places": 3}.items():
        assert isinstance(found[name], MetaTensor) and found[name].shape == (channels, *fixed.shape[1:]), name
        np.testing.assert_allclose(found[name].affine, fixed.affine, atol=1e-5)
    assert found["warped"].meta["filename_or_obj"] == pair["moving"]
    saved = io.read_scan(found["warped"].meta["saved_to"])
    np.testing.assert_allclose(saved[0], found["warped"].numpy(), atol=1e-6)
    np.testing.assert_allclose(saved[1], io.read_scan(pair["fixed"])[1], atol=1e-5)
    assert found["moving"].shape != fixed.shape and found["warped"].dtype == torch.float32
    assert found["warped_label"].dtype == found["moving_label"].dtype


def test_it_is_registered(found: dict) -> None:
    row = found["registration"]
    assert row["bundle"] == "samconvex" and row["verdict"] in ("plausible", "doubtful")
    assert row["tre_mm_after"] < 0.6 * row["tre_mm_before"]
    assert row["dice_after"] > row["dice_before"] + 0.02
    grid = found["fixed"].shape[1:], found["fixed"].affine.numpy()
    moving, warped, fixed = (found[f"{role}_label"].numpy()[0] for role in ("moving", "warped", "fixed"))
    there = mapping.resample(moving, found["moving"].affine.numpy(), *grid, nearest=True)
    same = [np.mean(label == fixed) for label in (there, warped)]
    assert same[1] > same[0] + 0.1  # by the headers alone, and registered


def test_warped_along_is_warped_alike(found: dict) -> None:
    np.testing.assert_array_equal(found["warped_twin"], found["warped_label"])
    np.testing.assert_allclose(found["warped_moving"], found["warped"], atol=1e-6)


def test_displacement_is_the_ddf_of_monai(found: dict) -> None:
    """The places of the moving voxels, warped along, are those that x + disp(x) names: in voxels of the fixed grid."""
    disp, affine = found["disp"].as_tensor(), found["fixed"].affine.numpy()
    voxels = fields.identity(disp.shape[1:], disp)[0] + disp
    there = np.einsum("ab,bijk->aijk", affine[:3, :3], voxels) + affine[:3, 3, None, None, None]
    inside = found["warped_label"].numpy()[0] > 0
    np.testing.assert_allclose(there[:, inside], found["warped_places"].numpy()[:, inside], atol=1e-3)
    # and Warp of MONAI does with it what our operator does
    image = found["fixed"].as_tensor()[None]
    np.testing.assert_allclose(Warp("bilinear", "border")(image, disp[None]), warp(image, disp[None]), atol=1e-4)


def test_what_is_wrong_is_said_when_it_is_made() -> None:
    with pytest.raises(InputError, match="'keys' must be two, of the moving and fixed scan, got .'moving',"):
        RegisterDeformabled("moving")
    with pytest.raises(InputError, match="'mode' must be one of nearest, bilinear, got 'cubic'"):
        RegisterDeformabled(along="t2", mode="cubic")
    with pytest.raises(InputError, match="none: no such bundle"):
        RegisterDeformabled(bundle="none")
    with pytest.raises(InputError, match="--refine_step: there is no such option, did you mean --refine_steps?"):
        RegisterDeformabled(refine_step=3)


def test_what_is_missing(pair: dict[str, str]) -> None:
    with pytest.raises(KeyError, match="fixed"):
        RegisterDeformabled()({"moving": pair["moving"]})
    data = {"moving": pair["moving"]}
    assert RegisterDeformabled(allow_missing_keys=True)(data) == data


def test_a_label_of_several_channels_is_refused(pair: dict[str, str]) -> None:
    """Its other channels would be lost."""
    label, affine = io.read_label(pair["moving_label"])
    data = {"moving": pair["moving"], "fixed": pair["fixed"], "moving_label": (np.concatenate([label, label]), affine)}
    with pytest.raises(Exception) as caught:
        RegisterDeformabled(**OPTIONS)(data)
    assert "a label map has one channel, this one has 2 channels" in sentence_of(caught.value)
