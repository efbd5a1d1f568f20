"""Geometry of the whole path: what we write, ITK alone and a plain formula must reproduce from the original files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from grids import GRIDS, PLAIN, grid, voxels_of, write_pair
from monai.data import MetaTensor
from monai.transforms import Compose

from common import InputError, phantom
from common.__main__ import invert
from common.quality import measure
from common.run import outputs
from common.run.example import write_phantom
from common.run.transforms import AlignAndGridd, DeliverPaird, LoadScansd, PackPaird, ScaleForegroundd
from common.space import io
from common.space.points import read_points, write_points


class Delivered(NamedTuple):
    """The original files of a pair, the folder written for it, and its row."""

    paths: dict[str, Path]
    out: Path
    row: dict
    inside: np.ndarray  # fixed foreground
    matrix: np.ndarray  # of the pre-alignment
    onto: np.ndarray  # affine of the working grid


def known_displacement(voxels: np.ndarray) -> np.ndarray:
    """Displacement (..., 3) at voxels of the working grid: up to 1.8 a component, all three different, no folds."""
    i, j, k = np.moveaxis(voxels, -1, 0)
    parts = np.sin(j / 7 + 0.4), np.cos(k / 6) * np.sin(i / 9), np.sin((i + j) / 11 - 0.5)
    return 1.8 * np.stack(parts, -1)


@pytest.fixture(scope="module", params=GRIDS)
def delivered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Delivered:
    """A pair through all transforms, with a known displacement in place of a network's."""
    folder = tmp_path_factory.mktemp("pair")
    paths = write_pair(folder, *GRIDS[request.param])
    before = [LoadScansd(), AlignAndGridd(spacing=4.0), ScaleForegroundd(("moving_work", "fixed_work")), PackPaird()]
    data = Compose(before)({"id": "pair"} | {name: str(path) for name, path in paths.items()})
    assert data["image"].shape[0] == 2 and nib.aff2axcodes(data["image"].affine.numpy()) == ("R", "A", "S")
    pred = known_displacement(voxels_of(data["image"].shape[1:]))
    data["pred"] = torch.from_numpy(np.moveaxis(pred, -1, 0).astype(np.float32))
    row = DeliverPaird(str(folder / "out"), save_inverse=True, neurological=True)(data)["row"]
    inside = np.asarray(nib.load(paths["fixed"]).dataobj) > 0
    return Delivered(paths, folder / "out" / "pair", row, inside, data["matrix"].numpy(), data["image"].affine.numpy())


def itk_alone(delivered: Delivered, role: str) -> np.ndarray:
    """ITK's own filter on the original files and transform.h5."""
    moving, fixed = (itk.imread(str(delivered.paths[name]), itk.F) for name in (role, "fixed"))
    (transform,) = itk.transformread(str(delivered.out / "transform.h5"))
    kind = itk.NearestNeighborInterpolateImageFunction if "label" in role else itk.LinearInterpolateImageFunction
    result = itk.resample_image_filter(
        moving,
        transform=transform,
        interpolator=kind[type(moving), itk.D].New(),
        use_reference_image=True,
        reference_image=fixed,
    )
    return itk.array_from_image(result).T


def by_formula(delivered: Delivered, role: str, *, displaced: bool = True) -> np.ndarray:
    """warped(x) = moving(A_m^-1 (A_f x + u(x))) with u of displacement.nii.gz, LPS turned to RAS; 0 outside."""
    moving, fixed = nib.load(delivered.paths[role]), nib.load(delivered.paths["fixed"])
    vectors = nib.load(delivered.out / "displacement.nii.gz")
    np.testing.assert_allclose(vectors.affine, fixed.affine, atol=1e-4)
    points = nib.affines.apply_affine(fixed.affine, voxels_of(fixed.shape))
    if displaced:
        points = points + vectors.get_fdata()[:, :, :, 0] * [-1, -1, 1]
    places = nib.affines.apply_affine(np.linalg.inv(moving.affine), points)
    values = moving.get_fdata()
    if "label" in role:
        index = np.rint(places).astype(int)
        within = ((index >= 0) & (index < values.shape)).all(-1)
        i, j, k = np.moveaxis(np.clip(index, 0, np.array(values.shape) - 1), -1, 0)
        return np.where(within, values[i, j, k], 0)
    within = ((places >= 0) & (places <= np.array(values.shape) - 1)).all(-1)
    first = np.clip(np.floor(places).astype(int), 0, np.array(values.shape) - 2)
    share = places - first
    total = np.zeros(fixed.shape)
    for corner in np.ndindex(2, 2, 2):
        weight = np.where(corner, share, 1 - share).prod(-1)
        total += weight * values[tuple(np.moveaxis(first + corner, -1, 0))]
    return np.where(within, total, 0)


@pytest.mark.parametrize("independent", [itk_alone, by_formula])
def test_original_moving_is_reproduced(delivered: Delivered, independent: Callable) -> None:
    warped = nib.load(delivered.out / "warped.nii.gz")
    fixed = nib.load(delivered.paths["fixed"])
    np.testing.assert_allclose(warped.affine, fixed.affine, atol=1e-4)
    assert warped.shape == fixed.shape
    values = warped.get_fdata()
    bound = 0.01 * np.ptp(values)
    error = np.abs(values - independent(delivered, "moving"))[delivered.inside].mean()
    assert error < bound, f"mean difference {error:.2f}, allowed {bound:.2f}"
    still = np.abs(values - by_formula(delivered, "moving", displaced=False))[delivered.inside].mean()
    assert still > 10 * bound, "the transform does nothing, so that nothing was tested"


@pytest.mark.parametrize("independent", [itk_alone, by_formula])
def test_original_label_is_reproduced(delivered: Delivered, independent: Callable) -> None:
    label = np.asarray(nib.load(delivered.out / "warped_label.nii.gz").dataobj)
    assert label.dtype == np.uint8 and set(np.unique(label)) == set(range(10))
    equal = (label == independent(delivered, "moving_label"))[delivered.inside].mean()
    assert equal >= 0.99, f"{100 * equal:.2f} % of the labels are equal"


def test_files_hold_the_displacement_that_was_given(delivered: Delivered) -> None:
    """T(p) = M (p + L u(G^-1 p)), G the working grid's affine, L its linear part, u in voxels: in both files."""
    fixed = nib.load(delivered.paths["fixed"])
    points = nib.affines.apply_affine(fixed.affine, np.argwhere(delivered.inside))
    u = known_displacement(nib.affines.apply_affine(np.linalg.inv(delivered.onto), points))
    expected = nib.affines.apply_affine(delivered.matrix, points + u @ delivered.onto[:3, :3].T)
    vectors = nib.load(delivered.out / "displacement.nii.gz").get_fdata()[:, :, :, 0][delivered.inside]
    error = np.linalg.norm(points + vectors * [-1, -1, 1] - expected, axis=1)
    assert error.max() < 0.1, f"displacement.nii.gz is {error.max():.2f} mm off"  # linear between working voxels: 0.05
    (transform,) = itk.transformread(str(delivered.out / "transform.h5"))
    for point, target in zip(points[::997], expected[::997]):
        found = np.array(transform.TransformPoint((point * [-1, -1, 1]).tolist())) * [-1, -1, 1]
        np.testing.assert_allclose(found, target, atol=0.1)


def test_inverse_goes_back(delivered: Delivered) -> None:
    (there,) = itk.transformread(str(delivered.out / "transform.h5"))
    (back,) = itk.transformread(str(delivered.out / "inverse_transform.h5"))
    chosen = np.random.default_rng(0).choice(np.argwhere(delivered.inside), 400)
    points = nib.affines.apply_affine(nib.load(delivered.paths["fixed"]).affine, chosen) * [-1, -1, 1]
    moved = np.array([there.TransformPoint(point) for point in points.tolist()])
    found = np.array([back.TransformPoint(point) for point in moved.tolist()])
    assert np.linalg.norm(moved - points, axis=1).mean() > 5
    assert np.linalg.norm(found - points, axis=1).mean() < 0.5


def test_landmarks_agree_with_itk(delivered: Delivered) -> None:
    """ITK takes the points of warped_points.csv to the moving landmarks, and its distances are the TRE of the row."""
    (transform,) = itk.transformread(str(delivered.out / "transform.h5"))
    moving, fixed, warped = (
        read_points(path).lps
        for path in (
            delivered.paths["moving_points"],
            delivered.paths["fixed_points"],
            delivered.out / "warped_points.csv",
        )
    )
    there = np.array([transform.TransformPoint(point) for point in warped.tolist()])
    assert np.linalg.norm(there - moving, axis=1).max() < 0.01
    assert np.linalg.norm(warped - moving, axis=1).mean() > 1
    there = np.array([transform.TransformPoint(point) for point in fixed.tolist()])
    assert delivered.row["tre_mm_after"] == pytest.approx(np.linalg.norm(there - moving, axis=1).mean(), abs=1e-4)
    assert delivered.row["landmarks"] == 12 and delivered.row["tre_mm_before"] > 0.5


@pytest.mark.parametrize("given", [".csv", ".fcsv", ".mrk.json"])
def test_points_come_out_as_they_went_in(delivered: Delivered, tmp_path: Path, given: str) -> None:
    """Markups of 3-D Slicer come out as markups too, with their names, where warped_points.csv has them."""
    marks = read_points(delivered.paths["moving_points"])
    write_points(marks, tmp_path / f"moving{given}")
    scans, transform = (delivered.paths[name] for name in ("moving", "fixed")), delivered.out / "transform.h5"
    beside = {"moving_points": tmp_path / f"moving{given}", "fixed_points": delivered.paths["fixed_points"]}
    beside = {name: str(path) for name, path in beside.items()}
    pair = measure.read_registration(*scans, str(transform), **beside, spacing=4.0)
    writers = outputs.files_of(pair, measure.warp_pair(pair), False, points_like=beside["moving_points"])
    found = sorted(name for name in writers if name.startswith("warped_points"))
    assert found == [f"warped_points{ending}" for ending in sorted({".csv", given})]
    expected = read_points(delivered.out / "warped_points.csv")
    for name in found:
        writers[name](tmp_path / name)
        points = read_points(tmp_path / name)
        np.testing.assert_allclose(points.lps, expected.lps, atol=2e-3)
        assert points.names == expected.names == marks.names


def test_the_commands_say_what_the_row_says(delivered: Delivered) -> None:
    """`report` means the same by "before", from the transform alone, and `invert` by the error of the inverse file."""
    paths = {name: str(path) for name, path in delivered.paths.items()}
    scans, transform = (paths.pop("moving"), paths.pop("fixed")), str(delivered.out / "transform.h5")
    pair = measure.read_registration(*scans, transform, **paths, spacing=4.0)
    again = measure.measure(pair, measure.warp_pair(pair))[0]
    for name in ("ncc", "dice", "tre_mm"):
        for when in ("before", "after"):
            assert again[f"{name}_{when}"] == pytest.approx(delivered.row[f"{name}_{when}"], abs=2e-3), name
    told = json.loads((delivered.out / "report.json").read_text())["before"]
    assert told == pair.before == "the scans after the alignment"
    text = invert(transform, str(delivered.out.parent / "inverse.h5"), reference=scans[1])
    found = (delivered.row[f"inverse_file_error_{name}"] for name in ("mm", "p99_mm"))
    assert "mean {:.3f} mm, 99th percentile {:.3f} mm".format(*found) in text


def test_row_and_folder_are_complete(delivered: Delivered) -> None:
    names = "warped.nii.gz transform.h5 displacement.nii.gz warped_label.nii.gz inverse_transform.h5"
    names += " warped_points.csv report.json report.png report.html thumbnail.webp"
    assert set(names.split()) == {path.name for path in delivered.out.iterdir()}
    assert '"radiological": false' in (delivered.out / "report.html").read_text(encoding="utf-8")
    content = json.loads((delivered.out / "report.json").read_text())
    assert content["verdict"] == "doubtful" and content["warnings"][0].startswith("no improvement")
    row = delivered.row
    assert row["id"] == "pair" and row["fixed"] == str(delivered.paths["fixed"])
    assert row["ncc_before"] > row["ncc_after"], "a displacement out of the air must not improve an aligned pair"
    assert row["dice_before"] > row["dice_after"] > 0 and row["folding_pct"] == 0 and row["inverse_error_mm"] < 0.5
    assert 1.8 < row["disp_mean_mm"] < row["disp_max_mm"] < 1.8 * 4 * 3**0.5 + 0.1


# ---- refusals and small steps ---------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> dict[str, str]:
    """A pair of small cubes with labels; the files lie in tmp_path."""
    cube = np.zeros((12, 12, 12), np.float32)
    cube[3:9, 3:9, 3:9] = np.random.default_rng(0).uniform(1, 2, (6, 6, 6))
    for role in ("moving", "fixed"):
        io.write_scan(cube, np.eye(4), tmp_path / f"{role}.nii.gz")
        io.write_label(cube > 0, np.eye(4), tmp_path / f"{role}_label.nii.gz")
    return {name: str(tmp_path / f"{name}.nii.gz") for name in ("moving", "fixed", "moving_label", "fixed_label")}


@pytest.mark.parametrize("crop", (True, False))
def test_crop(crop: bool, tmp_path: Path) -> None:
    """The working grid follows the fixed foreground, or keeps the whole field of view."""
    paths = write_pair(tmp_path, PLAIN, grid((64, 70, 60), np.diag([4, 4, 4])))
    loaded = LoadScansd()({name: str(path) for name, path in paths.items()})
    work = AlignAndGridd(spacing=None, prealign="none", crop=crop)(loaded)["fixed_work"]
    assert work.shape[1:] == ((32, 48, 32) if crop else (64, 80, 64))
    assert (work > 0).sum() == (loaded["fixed"] > 0).sum()


def test_scans_apart_without_alignment_are_refused(small: dict[str, str]) -> None:
    far = nib.affines.from_matvec(np.eye(3), [300.0, 0, 0])
    io.write_scan(io.read_scan(small["fixed"])[0], far, Path(small["moving"]))
    loaded = LoadScansd()({key: small[key] for key in ("moving", "fixed")})
    with pytest.raises(InputError) as caught:
        AlignAndGridd(spacing=None, prealign="none")(loaded)
    text = str(caught.value)
    assert small["moving"] in text and small["fixed"] in text and "--prealign affine" in text and "\n" not in text


def test_load_refuses_what_does_not_belong(small: dict[str, str]) -> None:
    def refused(words: str, name: str) -> None:
        with pytest.raises(InputError, match=words) as caught:
            LoadScansd()(small)
        assert str(caught.value).startswith(small[name]) and "\n" not in str(caught.value)

    label = io.read_scan(small["moving_label"])[0][0]
    moved = nib.affines.from_matvec(np.eye(3), [0, 0, 3.0])
    io.write_label(label, moved, Path(small["moving_label"]))
    refused("elsewhere in space than its scan", "moving_label")
    io.write_label(label[:-1], np.eye(4), Path(small["moving_label"]))
    refused("label map has shape", "moving_label")
    io.write_scan(np.full((12, 12, 12), 7, np.float32), np.eye(4), Path(small["moving"]))
    refused("is constant, every voxel is 7", "moving")


def test_masks_come_onto_the_working_grid(small: dict[str, str], tmp_path: Path) -> None:
    """Moving then fixed, 0 or 1; a scan without a mask counts everywhere; without any there is none."""
    mask = np.zeros((12, 12, 12), np.float32)
    mask[4:8, 2:6, 3:9] = 3
    io.write_label(mask, np.eye(4), tmp_path / "mask.nii.gz")
    align = AlignAndGridd(spacing=None, prealign="none", divisor=4, crop=False)
    packed = align(LoadScansd()(small | {"fixed_mask": str(tmp_path / "mask.nii.gz")}))["mask"]
    np.testing.assert_array_equal(packed[0], np.ones((12, 12, 12)))
    np.testing.assert_array_equal(packed[1], mask > 0)
    packed = align(LoadScansd()(small | {"moving_mask": str(tmp_path / "mask.nii.gz")}))["mask"]
    np.testing.assert_array_equal(packed, np.stack([mask > 0, np.ones((12, 12, 12))]))
    assert "mask" not in align(LoadScansd()(small))
    finer = nib.affines.from_matvec(np.eye(3) / 2, [-0.25] * 3)  # voxels of half the size: brought on by the headers
    io.write_label(mask.repeat(2, 0).repeat(2, 1).repeat(2, 2), finer, tmp_path / "finer.nii.gz")
    packed = align(LoadScansd()(small | {"fixed_mask": str(tmp_path / "finer.nii.gz")}))["mask"]
    np.testing.assert_array_equal(packed[1], mask > 0)


def test_lesions_are_widened_and_left_out(small: dict[str, str], tmp_path: Path) -> None:
    lesion = np.zeros((12, 12, 12), np.uint8)
    lesion[5, 6, 7] = 1
    io.write_label(lesion, np.eye(4), tmp_path / "lesion.nii.gz")
    apart = np.linalg.norm(np.moveaxis(np.indices(lesion.shape), 0, -1) - (5, 6, 7), axis=-1)
    loaded = LoadScansd(lesion_margin=2.0)(small | {"moving_lesion": str(tmp_path / "lesion.nii.gz")})
    np.testing.assert_array_equal(loaded["moving_mask"][0], apart > 2)
    own = small | {"moving_lesion": str(tmp_path / "lesion.nii.gz"), "lesion_margin": 3.0}
    np.testing.assert_array_equal(LoadScansd(lesion_margin=2.0)(own)["moving_mask"][0], apart > 3)
    assert "moving_lesion" not in loaded and "fixed_mask" not in loaded
    io.write_label(0 * lesion, np.eye(4), tmp_path / "none.nii.gz")  # a person of the cohort without one
    assert LoadScansd()(small | {"fixed_lesion": str(tmp_path / "none.nii.gz")})["fixed_mask"].all()


MASKS = {
    "empty": ("mask", 0, 0.0, "the mask leaves nothing of the scan .* to look at; .* is given as --fixed_lesion"),
    "all of it": ("lesion", 1, 0.0, "the lesion mask leaves nothing of the scan"),
    "elsewhere": ("mask", 1, 300.0, "the mask lies elsewhere in space than its scan"),
}


@pytest.mark.parametrize("kind, value, shift, words", MASKS.values(), ids=MASKS)
def test_masks_that_cannot_be_meant(
    small: dict[str, str], tmp_path: Path, kind: str, value: int, shift: float, words: str
) -> None:
    place = nib.affines.from_matvec(np.eye(3), [shift] * 3)
    io.write_label(np.full((12, 12, 12), value, np.uint8), place, tmp_path / "mask.nii.gz")
    with pytest.raises(InputError, match=words) as caught:
        LoadScansd()(small | {f"fixed_{kind}": str(tmp_path / "mask.nii.gz")})
    assert "\n" not in str(caught.value)


def test_points_guide_or_are_measured(tmp_path: Path) -> None:
    """Never both: every fifth is measured; the alignment starts from the others; their voxels belong together."""
    row = write_phantom(tmp_path / "pair")
    data = LoadScansd()(row)
    data = AlignAndGridd(spacing=8.0, prealign="rigid", guide=0.1, holdout=0.25)(data)
    assert data["measured"].tolist() == [n % 4 == 3 for n in range(12)]
    fixed, moving = data["guides"].numpy()
    onto = data["fixed_work"].affine.numpy()
    read = {role: read_points(row[f"{role}_points"]).lps * [-1, -1, 1] for role in ("fixed", "moving")}
    marks = {role: found[~data["measured"]] for role, found in read.items()}
    np.testing.assert_allclose(nib.affines.apply_affine(onto, fixed), marks["fixed"], atol=1e-3)
    there = nib.affines.apply_affine(data["matrix"].numpy() @ onto, moving)
    np.testing.assert_allclose(there, marks["moving"], atol=1e-3)
    mm = np.linalg.norm(onto[:3, 0])
    assert np.linalg.norm(fixed - moving, axis=1).mean() * mm < 5
    size = data["fixed_work"].shape[1:]
    data = PackPaird()(ScaleForegroundd(("moving_work", "fixed_work"))(data)) | {"pred": torch.zeros(3, *size)}
    row = DeliverPaird(str(tmp_path / "out"), save=False)(data)["row"]
    assert (row["landmarks"], row["guides"]) == (3, 9)
    bare = {"id": "x"} | {role: str(tmp_path / "pair" / f"{role}.nii.gz") for role in ("moving", "fixed")}
    with pytest.raises(InputError, match="--guide needs landmarks of both scans"):
        AlignAndGridd(spacing=8.0, guide=0.1)(LoadScansd()(bare))


def test_align_refuses_modes_and_channels(small: dict[str, str]) -> None:
    with pytest.raises(InputError, match="--prealign must be one of affine, rigid, none, got warp"):
        AlignAndGridd(spacing=None, prealign="warp")
    loaded = LoadScansd()(small)
    loaded["moving"] = MetaTensor(torch.cat([loaded["moving"]] * 2), meta=loaded["moving"].meta)
    with pytest.raises(InputError, match="has 2 channels, the fixed scan .* has 1"):
        AlignAndGridd(spacing=None)(loaded)


def test_scale_foreground_known_values() -> None:
    """Foreground 1..201: its 99.5th percentile is 200; larger is clipped, background stays 0, channels are separate."""
    first = torch.zeros(2, 10, 10, 5)
    first[0].view(-1)[:201] = torch.arange(1.0, 202.0)
    first[0].view(-1)[300] = -5
    scaled = ScaleForegroundd(("a",))({"a": MetaTensor(first)})["a"].as_tensor()
    values = scaled[0].reshape(-1)
    torch.testing.assert_close(values[[0, 99, 199]], torch.tensor([0.005, 0.5, 1.0]))
    assert values[200] == 1 and values[300] == 0 and values[250] == 0
    assert not scaled[1].any(), "an empty channel stays empty"


def test_scale_of_scans_with_a_unit() -> None:
    """CT: air is 0 whatever its value; a range asked for is obeyed; negative values do not move MR's background."""
    scan = torch.linspace(-1000, 1000, 1000).view(1, 10, 10, 10)
    by_rule = ScaleForegroundd(("a",))({"a": MetaTensor(scan.clone())})["a"].as_tensor().flatten()
    assert by_rule[0] == 0 and by_rule[-1] == 1 and by_rule[500] == pytest.approx(0.5, abs=0.01)
    asked = ScaleForegroundd(("a",), [-500, 500])({"a": MetaTensor(scan.clone())})["a"].as_tensor().flatten()
    torch.testing.assert_close(asked, ((scan.flatten() + 500) / 1000).clamp(0, 1))
    with pytest.raises(InputError, match="--intensity_range must be .low, high. with low < high"):
        ScaleForegroundd(("a",), [5, 5])


def test_pack_puts_moving_first() -> None:
    space = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64))
    moving = MetaTensor(torch.ones(1, 4, 5, 6), meta={"filename_or_obj": "m"})
    fixed = MetaTensor(torch.full((1, 4, 5, 6), 2.0), affine=space, meta={"filename_or_obj": "f"})
    packed = PackPaird()({"moving_work": moving, "fixed_work": fixed, "id": "x"})
    assert set(packed) == {"id", "image"}
    assert packed["image"][0].unique().tolist() == [1] and packed["image"][1].unique().tolist() == [2]
    assert torch.equal(packed["image"].affine, space) and packed["image"].meta["filename_or_obj"] == "f"
    with pytest.raises(InputError, match=r"m: has grid \(4, 5, 5\), f has \(4, 5, 6\)"):
        PackPaird()({"moving_work": moving[..., :5], "fixed_work": fixed})


def test_pack_under_another_name() -> None:
    data = {"a": MetaTensor(torch.zeros(1, 2, 2, 2)), "b": MetaTensor(torch.ones(1, 2, 2, 2)), "image": 0}
    packed = PackPaird("a", "b", "label")(data)
    assert set(packed) == {"image", "label"} and packed["image"] == 0
    assert packed["label"].flatten(1).mean(1).tolist() == [0, 1]


@pytest.mark.parametrize("asked, there", [(None, True), (True, True), (False, False)])
def test_displacement_file_is_an_option(small: dict[str, str], tmp_path: Path, asked: bool | None, there: bool) -> None:
    """Of a small scan it is written; where it is left out, the report says so, and how long every stage took."""
    data = {"id": "pair", "moving": small["moving"], "fixed": small["fixed"]}
    data = Compose([LoadScansd(), AlignAndGridd(1.0, "none", divisor=1, crop=False), PackPaird()])(data)
    data |= {"pred": torch.zeros(3, *data["image"].shape[1:])}
    DeliverPaird(str(tmp_path / "out"), displacement=asked)(data)
    assert (tmp_path / "out" / "pair" / "displacement.nii.gz").exists() == there
    run = json.loads((tmp_path / "out" / "pair" / "report.json").read_text())["run"]
    assert ("left_out" in run) != there
    assert {"loading", "resampling", "warping", "measuring", "writing", "drawing"} <= set(run["stages_cpu_s"])


def test_segmentations_are_delivered(small: dict[str, str], tmp_path: Path) -> None:
    """Class numbers on a working grid of half the resolution come back on the fixed grid, as whole numbers."""
    data = {"id": "pair", "moving": small["moving"], "fixed": small["fixed"]}
    before = [LoadScansd(), AlignAndGridd(2.0, "none", divisor=1, crop=False), PackPaird()]
    data = Compose(before)(data)
    size = tuple(data["image"].shape[1:])
    numbers = torch.randint(0, 28, (1, *size)).float()
    data |= {"pred": torch.zeros(3, *size), "warped_segmentation": numbers, "fixed_segmentation": 27 - numbers}
    DeliverPaird(str(tmp_path / "out"))(data)
    written = {n: nib.load(tmp_path / "out" / "pair" / f"{n}_segmentation.nii.gz") for n in ("warped", "fixed")}
    to_work = np.linalg.inv(data["image"].affine.numpy())
    index = np.rint(nib.affines.apply_affine(to_work, voxels_of((12, 12, 12))) - 1e-3).astype(int)
    inner = (slice(2, 10),) * 3
    expected = numbers[0].numpy()[tuple(np.moveaxis(index, -1, 0).clip(0, np.array(size)[:, None, None, None] - 1))]
    for image, values in ((written["warped"], expected), (written["fixed"], 27 - expected)):
        np.testing.assert_allclose(image.affine, np.eye(4), atol=1e-6)
        assert np.issubdtype(image.get_data_dtype(), np.integer)
        np.testing.assert_array_equal(np.asarray(image.dataobj)[inner], values[inner])


def test_scans_below_zero(tmp_path: Path) -> None:
    """As CT: values around -1000 are air, not "no overlap", and air is what fills the outside of a warped scan."""
    size, affine = PLAIN
    image = phantom.sample(size, affine)[0] * 1000 - 1024
    shifted = nib.affines.from_matvec(np.eye(3), [20.0, 0, 0]) @ affine
    for name, space in (("moving", shifted), ("fixed", affine)):
        io.write_scan(image, space, tmp_path / f"{name}.nii.gz")
    before = [
        LoadScansd(),
        AlignAndGridd(spacing=4.0, prealign="none"),
        ScaleForegroundd(("moving_work", "fixed_work")),
        PackPaird(),
    ]
    paths = {name: str(tmp_path / f"{name}.nii.gz") for name in ("moving", "fixed")}
    data = Compose(before)({"id": "ct"} | paths)
    data["pred"] = torch.zeros(3, *data["image"].shape[1:])
    DeliverPaird(str(tmp_path / "out"))(data)
    warped = io.read_scan(tmp_path / "out" / "ct" / "warped.nii.gz")[0]
    assert warped.min() == pytest.approx(-1024, abs=0.5) and warped[0, 0, 0, 0] == pytest.approx(-1024, abs=0.5)
