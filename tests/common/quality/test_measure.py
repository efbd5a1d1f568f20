"""Measures, verdict, report and pictures of registrations with known answers, good and bad."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from common import phantom
from common.quality import measure, metrics, picture, report, summary, verdict
from common.quality.views import Views
from common.space import io, mapping
from common.space.transform_files import read_transform, write_transform

GOOD = {
    **dict(structure_before=0.5, structure_after=0.7, structure_aligned=0.5, structure_mirrored=0.3),
    **dict(overlap=0.9, ncc_before=0.6, ncc_after=0.9, nmi_before=0.1, nmi_after=0.3, folding_pct=0.0, sdlogj=0.3),
    **dict(dice_before=0.5, dice_after=0.7, tre_mm_before=4.0, tre_mm_after=1.0, labels=9, labels_lost=0),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair that differs by a known translation of (8, -4, 12) mm RAS, with labels and landmarks."""
    folder = tmp_path_factory.mktemp("files")
    size, affine = (36, 44, 34), nib.affines.from_matvec(np.diag([4.0, 4, 4]), [-70, -86, -66])
    image, label = phantom.sample(size, affine)
    shift = nib.affines.from_matvec(np.eye(3), [8, -4, 12])
    for name, space in (("fixed", affine), ("moving", shift @ affine)):
        io.write_scan(image, space, folder / f"{name}.nii.gz")
        io.write_label(label, space, folder / f"{name}_label.nii.gz")
    (folder / "fixed.csv").write_text("x,y,z\n0,0,0\n20,10,0\n")
    (folder / "moving.csv").write_text("x,y,z\n-8,4,12\n12,14,15\n")  # LPS; the second is 3 mm off
    write_transform(mapping.affine_transform(shift), folder / "good.tfm")
    far = nib.affines.from_matvec(np.eye(3), [-30.0, 20, 25])
    write_transform(mapping.affine_transform(far), folder / "bad.tfm")
    return folder


def registration(files: Path, name: str) -> measure.Registration:
    return measure.read_registration(
        *(str(files / f) for f in ("moving.nii.gz", "fixed.nii.gz", f"{name}.tfm")),
        moving_label=str(files / "moving_label.nii.gz"),
        fixed_label=str(files / "fixed_label.nii.gz"),
        moving_points=str(files / "moving.csv"),
        fixed_points=str(files / "fixed.csv"),
    )


def test_large_scans_are_compared_on_a_lattice(files: Path) -> None:
    """Every second voxel says nearly the same, and the overlap of the foregrounds too; what is written is whole."""
    pair = registration(files, "good")
    whole, some = measure.warp_pair(pair), measure.warp_pair(pair, lattice=pair.fixed[0].size // 4)
    assert (whole.step, some.step) == (1, 2) and some.after.shape == whole.after.shape
    np.testing.assert_allclose(some.before, whole.before[::2, ::2, ::2], atol=1e-3)
    all_of, part = (measure.measure(pair, warped)[0] for warped in (whole, some))
    for name in ("ncc_before", "ncc_after", "overlap"):
        assert part[name] == pytest.approx(all_of[name], abs=0.03), name
    assert part["nmi_after"] > 0.9 > part["nmi_before"]  # too few voxels here for its number
    assert part["dice_before"] == all_of["dice_before"]


def test_known_values(files: Path) -> None:
    pair = registration(files, "good")
    row, details = measure.measure(pair, measure.warp_pair(pair))
    assert row["dice_after"] == pytest.approx(1) and row["dice_before"] < 0.8
    assert row["ncc_after"] == pytest.approx(1, abs=1e-4) and row["nmi_after"] > 0.9 > row["nmi_before"]
    assert row["hd95_after"] == pytest.approx(0, abs=1e-6) and row["hd95_before"] > 4
    shift = 224**0.5  # of (8, 4, 12)
    assert row["tre_mm_after"] == pytest.approx(1.5, abs=1e-6) and row["landmarks"] == 2
    assert row["tre_mm_before"] == pytest.approx((shift + 305**0.5) / 2) and row["tre_max_mm_after"] == pytest.approx(3)
    assert [mark["tre_mm_after"] for mark in details["landmarks"]] == pytest.approx([0, 3], abs=1e-6)
    assert row["disp_mean_mm"] == pytest.approx(shift, rel=1e-4) and row["folding_pct"] == 0
    assert details["displacement_mm"]["p50"] == pytest.approx(shift, rel=1e-4)
    assert set(details["labels"]) == {str(n) for n in range(1, 10)} and details["labels"]["5"]["dice_after"] == 1
    assert measure.inverse_error(pair, mapping.invert(pair.whole))["inverse_file_error_mm"] < 1e-4
    assert details["before"] == "the scans as they lie, not aligned"
    assert row["inverse_error_mm"] < 0.01 and row["inverse_failed_pct"] == 0


def test_inverse_consistency_of_a_folded_field(files: Path) -> None:
    """Measured in every report, at a sample of the voxels: what folds is not one-to-one, the rest is."""
    pair = registration(files, "good")
    disp = torch.zeros_like(pair.disp)
    i = torch.arange(disp.shape[1], dtype=torch.float32)
    disp[0] = (3 * torch.sin(i / 2) * (i < disp.shape[1] // 2))[:, None, None]  # slope down to -1.5 in one half
    row = measure.measure(dataclasses.replace(pair, disp=disp), measure.warp_pair(pair))[0]
    assert 10 < row["folding_pct"] < 40 and 10 < row["inverse_failed_pct"] < 70
    assert row["inverse_error_p99_mm"] > 8, "more than two voxels of 4 mm"
    smooth = measure.measure(dataclasses.replace(pair, disp=0.1 * disp), measure.warp_pair(pair))[0]
    assert smooth["inverse_failed_pct"] == 0 and 0 < smooth["inverse_error_mm"] < 0.01


def test_surfaces_of_many_labels_are_left_out_unless_asked_for(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = registration(files, "good")
    warped = measure.warp_pair(pair)
    assert "hd95_after" not in measure.measure(pair, warped, surface=False)[0]
    monkeypatch.setattr(measure, "FEW_LABELS", 8)
    assert "hd95_after" not in measure.measure(pair, warped)[0]
    assert "ssim_after" in measure.measure(pair, warped, surface=True)[0]


def test_what_a_transform_began_with(files: Path, tmp_path: Path) -> None:
    """Of a deformable composite the linear part is the start; the displacement on the grid is the rest."""
    disp = np.zeros((3, 36, 44, 34))
    disp[1] = 0.5
    affine = io.read_scan(files / "fixed.nii.gz")[1]
    linear = read_transform(files / "good.tfm")
    field = mapping.displacement_transform(disp, affine)
    write_transform(mapping.compose(field, linear), tmp_path / "t.h5")
    names = (str(files / "moving.nii.gz"), str(files / "fixed.nii.gz"), str(tmp_path / "t.h5"))
    pair = measure.read_registration(*names)
    np.testing.assert_allclose(mapping.matrix_of(pair.start), mapping.matrix_of(linear), atol=1e-6)
    inner = pair.disp[:, 4:-4, 4:-4, 4:-4]
    torch.testing.assert_close(inner, torch.tensor([0, 0.5, 0]).view(3, 1, 1, 1).expand_as(inner), atol=1e-4, rtol=0)


def test_good_and_bad_are_told_apart(files: Path, tmp_path: Path) -> None:
    """In words, in report.json, and in a picture that has something in it."""
    contents, pictures = {}, {}
    for name in ("good", "bad"):
        pair = registration(files, name)
        row, details = measure.measure(pair, measure.warp_pair(pair))
        notes = verdict.judge(row)
        content = report.report({"id": name} | row, details, notes, {"seconds": 1.0})
        report.write_report(content, tmp_path / f"{name}.json")
        picture.draw_report(Views(pair), content, tmp_path / f"{name}.png")
        contents[name] = json.loads((tmp_path / f"{name}.json").read_text())
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"), float)
    good, bad = contents["good"], contents["bad"]
    assert good["verdict"] == "plausible" and good["warnings"] == []
    assert bad["verdict"] == "doubtful" and len(bad["warnings"]) >= 3
    assert bad["warnings"][0].startswith("the scans hardly agree in structure")
    assert set(good) >= {"similarity", "overlap", "landmarks", "deformation", "run"}
    assert good["overlap"]["each"]["1"]["dice_after"] == 1 and good["run"]["versions"]["torch"] == torch.__version__
    assert good["deformation"]["displacement_mm"]["p99"] > 10
    for image in pictures.values():
        assert image.shape[0] > 600 and image.shape[1] > 1200 and image.std() > 20
    height = min(image.shape[0] for image in pictures.values())
    assert np.abs(pictures["good"][-height:] - pictures["bad"][-height:]).mean() > 5


def test_numbers_that_are_none_become_null(tmp_path: Path) -> None:
    details = {"before": "", "displacement_mm": {"p50": float("nan")}}
    report.write_report(report.report({"ncc_after": float("inf")} | {"id": "x"}, details, [], {}), tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["similarity"]["ncc_after"] is None and found["deformation"]["displacement_mm"]["p50"] is None


# ---- verdict --------------------------------------------------------------------------------------------------------

FAULTS = {
    "no improvement": ({"structure_after": 0.51}, "no improvement over the pre-alignment: structures agree by 0.50"),
    "unrelated": ({"structure_after": 0.3}, "the scans hardly agree in structure .0.30"),
    "mirrored": ({"structure_mirrored": 0.52}, "left and right may be exchanged .*structure 0.520 instead of 0.500"),
    "two contrasts": ({"ncc_before": 0.1, "ncc_after": 0.5}, "two modalities or contrasts were .* .correlation 0.10"),
    "elsewhere": ({"quick_agreement": 0.3, "quick_gain": 0.01}, "a quick registration by structure goes elsewhere"),
    "labels": ({"dice_after": 0.4}, "the labels overlap less than before: 0.50 before, 0.40 after"),
    "landmarks": ({"tre_mm_after": 5.0}, "the landmarks agree less than before: 4.00 mm before, 5.00 mm after"),
    "overlap": ({"overlap": 0.3}, "little overlap: the foregrounds share 0.30"),
    "folding": ({"folding_pct": 3.2}, "much folding: 3.2 % of the fixed foreground"),
    "rough": ({"sdlogj": 2.0}, "rough deformation"),
    "lost": ({"labels_lost": 2, "labels_lost_pct": 4.0}, "2 of 9 labels vanish, 4.0 % of the labelled voxels"),
    "inverse": ({"inverse_failed_pct": 3.1}, "the map is not one-to-one: there and back is half a voxel off or"),
    "inverse file": ({"inverse_file_failed_pct": 3.1}, "the inverse is half a voxel off or more in 3.1 %"),
    "nan": ({"structure_after": float("nan")}, "no improvement"),
}


@pytest.mark.parametrize("change, words", FAULTS.values(), ids=FAULTS)
def test_each_fault_gives_its_sentence(change: dict, words: str) -> None:
    assert verdict.judge(GOOD) == []
    (sentence,) = verdict.judge(GOOD | change)
    assert re.search(words, sentence), sentence


def test_what_a_page_begins_with() -> None:
    """The cause, not what follows from it; else the first reason."""
    rough, sides = "rough deformation: SDlogJ 2.0, above 1.1", "left and right may be exchanged in one scan"
    assert verdict.foremost([rough, sides]) == sides
    contrasts = "two modalities or contrasts were made to look alike"
    assert verdict.foremost([sides, "much folding: 3.2 %", contrasts]) == contrasts
    assert verdict.foremost([rough, "2 of 9 labels vanish"]) == rough


def test_what_is_no_fault() -> None:
    """A pair that is aligned already, a small label that vanishes, and contrasts whose correlation becomes negative."""
    for change in (
        {"structure_before": 0.98, "structure_after": 0.98, "ncc_before": 0.97, "ncc_after": 0.97},
        {"labels_lost": 1, "labels_lost_pct": 0.1},
        {"ncc_before": -0.3, "ncc_after": -0.6},
        {"quick_agreement": 0.3, "quick_gain": -0.01},
        {"quick_agreement": 0.8, "quick_gain": 0.01},
    ):
        assert verdict.judge(GOOD | change) == [], change


def test_rates_of_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the people that no threshold was chosen on, as the module says; from rows that tests/bench measured."""
    root = Path(__file__).parents[3]
    monkeypatch.syspath_prepend(str(root / "tests" / "bench"))
    bench = pytest.importorskip("bench_verdict")
    rows = json.loads(bench.RESULTS.read_text())["rows"]
    (good, false), (spoilt, found) = (bench.rates(rows, "B")[name] for name in ("good", "all spoilt"))
    assert found / spoilt >= 0.9 and false / good <= 0.1
    said = " ".join(verdict.__doc__.split())
    assert f"of {spoilt} spoilt registrations {found} were called doubtful" in said
    assert f"of {good} good ones {false} (" in said


def test_structure_does_not_depend_on_contrast() -> None:
    """1 for a scan with itself, turned over too; about 0 for noise."""
    space = nib.affines.from_matvec(np.diag([4.0, 4, 4]), [-70, -86, -66])
    scan = torch.from_numpy(phantom.sample((36, 44, 34), space)[0])[None, None]
    noise = torch.rand(scan.shape, generator=torch.Generator().manual_seed(0))
    found = metrics.structure(torch.cat([scan, 2 - scan, noise]), scan, torch.ones(scan.shape[2:], dtype=torch.bool))
    assert found[0] == pytest.approx(1) and found[1] == pytest.approx(1, abs=1e-4) and abs(found[2]) < 0.1


def test_scans_unlike_each_other_or_the_training_data() -> None:
    rng = np.random.default_rng(0)
    brain = np.zeros((20, 20, 20))
    brain[4:16, 4:16, 4:16] = rng.uniform(0.5, 0.8, (12, 12, 12))
    head, ct = brain + 0.01, 2000 * brain - 1000
    assert verdict.judge_scans({"a": brain, "b": brain}, {"a": brain, "b": brain}, "brain_t1") == []
    assert verdict.judge_scans({"a": brain, "b": brain}, {"a": brain, "b": brain}, None) == []
    (kinds,) = verdict.judge_scans({"a": brain, "b": head}, {"a": brain, "b": head}, None)
    assert "different kinds" in kinds and "a has a background of 0" in kinds
    (skull,) = verdict.judge_scans({"a": head, "b": head}, {"a": head}, "brain_t1")
    assert skull.startswith("a is not skull-stripped")
    (signed,) = verdict.judge_scans({"a": ct, "b": ct}, {"a": brain}, "brain_t1")
    assert "values below 0, as CT" in signed
    (dark,) = verdict.judge_scans({"a": brain, "b": brain}, {"a": brain / 3}, "brain_t1")
    assert dark.startswith("intensities unlike the training data: the median of a's foreground")


def test_real_scans_are_told_apart(development_data: Path) -> None:
    """Validation brains raise no doubt, T2 and a chest CT do."""
    from common.space.geometry import foreground_range

    def doubts(path: str) -> list[str]:
        file = development_data / "data" / "dev" / path
        if not file.exists():
            pytest.skip(f"development data not found: {file}")
        scan = io.read_scan(file)[0][0]
        low, high = foreground_range(scan)
        return verdict.judge_scans({path: scan}, {path: np.clip((scan - low) / (high - low), 0, 1)}, "brain_t1")

    assert doubts("brain_t1/images/oasis_1003.nii.gz") == [] and doubts("brain_t1/images/oasis_1107.nii.gz") == []
    assert "intensities unlike" in doubts("brain_ms/patient07_T2.nii.gz")[0]
    assert "as CT" in doubts("chest_ct/images/chest_01.nii.gz")[0]


def test_summary_of_a_cohort(tmp_path: Path) -> None:
    rows = [{"id": f"p{n}", "warnings": ""} | GOOD | {"dice_after": 0.6 + n / 50} for n in range(8)]
    rows += [{"id": "broken", "error": "broken.nii.gz: not an image"}, {"id": "odd", "warnings": "x"} | GOOD]
    summary.draw_summary(rows, tmp_path / "summary.png")
    image = np.asarray(Image.open(tmp_path / "summary.png").convert("RGB"), float)
    assert image.std() > 10 and image.shape[0] > 200
    summary.draw_summary(rows[8:9], tmp_path / "failed.png")  # nothing registered at all
    assert (tmp_path / "failed.png").stat().st_size > 1000


def test_inputs_are_hashed(tmp_path: Path) -> None:
    """As sha256sum says; a folder by its files in the order of their names, a header with its data."""
    for name, text in (("b", "two"), ("a", "one"), ("s.mhd", "head"), ("s.raw", "data")):
        (tmp_path / name).write_text(text)
    (tmp_path / "series").mkdir()
    for name in "ab":
        (tmp_path / "series" / name).write_text((tmp_path / name).read_text())
    given = {"fixed": tmp_path / "a", "moving": f"{tmp_path / 'a'};{tmp_path / 'b'}", "moving_label": None}
    found = report.inputs_of(given | {"series": tmp_path / "series", "header": tmp_path / "s.mhd"})
    one, two = (hashlib.sha256(text).hexdigest() for text in (b"one", b"two"))
    assert found["fixed"] == {"file": str(tmp_path / "a"), "sha256": one}
    assert [part["sha256"] for part in found["moving"]] == [one, two] and "moving_label" not in found
    assert found["series"]["sha256"] == hashlib.sha256(b"onetwo").hexdigest()
    assert found["header"]["sha256"] == hashlib.sha256(b"headdata").hexdigest()


def test_sentences_in_a_cell() -> None:
    sentences = ["much folding; try steps", "rough"]
    assert verdict.parted(verdict.joined(sentences)) == ["much folding, try steps", "rough"]
    assert verdict.parted("") == []
