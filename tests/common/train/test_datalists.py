"""Data sets of the papers, on tiny folders of the layout that their owners describe; never tried on the real ones."""

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser

from common import InputError
from common.run import data
from common.run.transforms import AlignAndGridd, LoadScansd
from common.space import io
from common.train import data as train_data
from common.train import datalists
from common.train.datalists import DATASETS, write_datalist
from common.train.transforms import ToTrainingGridd

SIZE = (5, 6, 7)
PRESETS = Path(datalists.__file__).parent / "presets"


def scan(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 5, SIZE).astype(np.int16)
    if path.suffix == ".img":
        itk.imwrite(io.to_itk(values, np.eye(4)), str(path.with_suffix(".hdr")))
    else:
        nib.save(nib.Nifti1Image(values, np.eye(4)), path)


def lpba40(root: Path) -> None:
    for n in range(1, 41):
        scan(root / f"delineation_space/S{n:02d}/S{n:02d}.delineation.skullstripped.img", n)
        scan(root / f"delineation_space/S{n:02d}/S{n:02d}.delineation.structure.label.img", n)


def ibsr18(root: Path) -> None:
    for n in range(1, 5):
        for kind in ("ana", "ana_strip", "seg_ana"):
            scan(root / f"IBSR_{n:02d}/IBSR_{n:02d}_{kind}.nii.gz", n)


def klein(root: Path, letter: str) -> None:
    for n, kind in itertools.product(range(1, 12), ("Heads", "Brains", "Atlases")):
        scan(root / kind / f"{letter}{n}.img", n)


def ixi(root: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("atlas", "Train/subject_0", "Train/subject_1", "Val/subject_2", "Test/subject_3"):
        path = root / "IXI_data" / f"{name}.pkl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps((rng.random(SIZE), rng.integers(0, 64, SIZE))))


def learn2reg(root: Path, name: str, *, keypoints: bool = False, paired: bool = False) -> None:
    cases, codes = [], [f"{name}_{n:04d}_{m:04d}" for n in range(1, 5) for m in ((0, 1) if paired else (0,))]
    for number, code in enumerate(codes):
        case = {"image": f"./imagesTr/{code}.nii.gz", "label": f"./labelsTr/{code}.nii.gz"}
        for path in case.values():
            scan(root / path, number)
        if keypoints:
            case["keypoints"] = f"./keypointsTr/{code}.csv"
            (root / "keypointsTr").mkdir(exist_ok=True)
            (root / case["keypoints"]).write_text("1.0,2.0,3.0\n2.5,2.0,1.0\n")
        cases.append(case)
    last = [f"./imagesTr/{code}.nii.gz" for code in codes[-2:]]
    content = {"name": name, "training": cases, "registration_val": [{"fixed": last[0], "moving": last[1]}]}
    if paired:  # as NLST: the two breaths of each person, those of the validation among them
        breaths = [f"./imagesTr/{code}.nii.gz" for code in codes]
        content["training_paired_images"] = [{"fixed": a, "moving": b} for a, b in zip(breaths[::2], breaths[1::2])]
    (root / f"{name}_dataset.json").write_text(json.dumps(content))


MAKERS: dict[str, tuple[Callable[[Path], None], tuple[int, int, int], int]] = {  # training, validation, test, pairs
    "ixi": (ixi, (3, 1, 1), 2),
    "lpba40": (lpba40, (25, 5, 10), 5 * 4 + 10 * 9),
    "abdomen_ctct": (lambda root: learn2reg(root, "AbdomenCTCT"), (2, 2, 0), 1),
    "oasis": (lambda root: learn2reg(root, "OASIS"), (2, 2, 0), 1),
    "lungct": (lambda root: learn2reg(root, "LungCT", keypoints=True, paired=True), (6, 2, 0), 1),
    "nlst": (lambda root: learn2reg(root, "NLST", keypoints=True, paired=True), (6, 2, 0), 1),
    "ibsr18": (ibsr18, (0, 0, 4), 12),
    "cumc12": (lambda root: klein(root, "m"), (0, 0, 11), 110),
    "mgh10": (lambda root: klein(root, "g"), (0, 0, 11), 110),
}


@pytest.mark.parametrize("name", DATASETS)
def test_datalist(name: str, tmp_path: Path) -> None:
    """Split and pairs as the papers have them; every path exists, can be read, and makes pairs for a bundle."""
    make, counts, pairs = MAKERS[name]
    make(tmp_path)
    content = write_datalist(name, str(tmp_path))
    assert tuple(len(content[part]) for part in ("training", "validation", "test")) == counts
    assert len(content["registration_pairs"]) == pairs
    cases = [case for part in ("training", "validation", "test") for case in content[part]]
    assert len({case["id"] for case in cases}) == len(cases)
    for case in cases[:3]:
        assert io.read_scan(tmp_path / case["image"])[0].shape == (1, *SIZE)
        assert io.read_scan(tmp_path / case["label"])[0].shape == (1, *SIZE)
    rows = data.list_pairs(dataset_dir=str(tmp_path))
    tested = [pair for pair in content["registration_pairs"] if pair["part"] == "test"]
    assert len(rows) == (len(tested) or pairs)
    assert all(Path(value).is_file() for row in rows for key, value in row.items() if key != "id")
    assert set(rows[0]) >= {"fixed", "moving", "fixed_label", "moving_label"}
    assert ("fixed_points" in rows[0]) == (name in ("lungct", "nlst"))
    assert (PRESETS / f"{content['preset']}.json").is_file()
    if counts[0]:
        assert len(train_data.list_scans(str(tmp_path))) == counts[0]
    trained = {"ixi": 2, "lungct": 3, "nlst": 3}.get(name)  # atlas to subject, breath to breath; else all with all
    assert len(train_data.training_pairs(str(tmp_path)) or []) == (trained or 0)


def test_names_of_structures(tmp_path: Path) -> None:
    ixi(tmp_path / "a"), learn2reg_of(tmp_path / "b", "AbdomenCTCT")
    assert len(write_datalist("ixi", str(tmp_path / "a"))["labels"]) == 30
    assert write_datalist("abdomen_ctct", str(tmp_path / "b"))["labels"]["6"] == "liver"
    assert len(datalists.LPBA_LABELS) == 54 and len(datalists.ABDOMEN_LABELS) == 13


def learn2reg_of(root: Path, name: str) -> None:
    root.mkdir()
    learn2reg(root, name)


def test_ixi_is_atlas_to_subject_and_keeps_the_values(tmp_path: Path) -> None:
    ixi(tmp_path / "in")
    content = write_datalist("ixi", str(tmp_path / "in"), str(tmp_path / "out"))
    assert {pair["moving"] for pair in content["registration_pairs"]} == {"atlas"}
    stored = pickle.loads((tmp_path / "in" / "IXI_data" / "Test" / "subject_3.pkl").read_bytes())
    found = io.read_scan(tmp_path / "out" / content["test"][0]["image"])[0][0]
    np.testing.assert_allclose(found, stored[0], atol=1e-6)
    label = io.read_scan(tmp_path / "out" / content["test"][0]["label"])[0][0]
    kept = np.isin(stored[1], [int(n) for n in content["labels"]])
    np.testing.assert_array_equal(label, np.where(kept, stored[1], 0))
    assert 0.2 < kept.mean() < 0.8 and content["labels"]["17"] == "Left-Hippocampus", "30 of 64 numbers"
    assert not (tmp_path / "in" / "dataset.json").exists()


@pytest.mark.parametrize("bundle", ["sacb_net", "dual_flownet", "residual_aligner"])
def test_training_reads_the_pairs(bundle: str, tmp_path: Path, repository: Path) -> None:
    """The atlas is the moving scan of every training pair of IXI, and never the fixed one."""
    ixi(tmp_path)
    write_datalist("ixi", str(tmp_path))
    parser = ConfigParser()
    parser.read_config(str(repository / "bundles" / bundle / "configs" / "train.json"))
    parser["dataset_dir"] = str(tmp_path)
    parser["train"]["preprocessing"] = parser["train"]["pair_transform"] = None
    found = parser.get_parsed_content("train::dataset")
    assert [found[n]["id"] for n in range(len(found))] == ["atlas_to_subject_0", "atlas_to_subject_1"]


class Evil:
    def __reduce__(self) -> tuple:
        return print, ("this code ran",)


def test_pickles_run_no_code(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ixi(tmp_path)
    (tmp_path / "IXI_data" / "atlas.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match="atlas.pkl: not a pair of a scan and its label map .*print is no array"):
        write_datalist("ixi", str(tmp_path))
    assert "this code ran" not in capsys.readouterr().out and not (tmp_path / "dataset.json").exists()


@pytest.mark.parametrize("name", DATASETS)
def test_another_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"does not look like {name}: .* not found"):
        write_datalist(name, str(tmp_path))
    with pytest.raises(InputError, match="no such folder"):
        write_datalist(name, str(tmp_path / "none"))
    with pytest.raises(InputError, match="colours: no such data set, there are ixi, lpba40"):
        write_datalist("colours", str(tmp_path))


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.json")), ids=lambda path: path.stem)
def test_training_and_inference_share_a_preset(path: Path, tmp_path: Path, repository: Path) -> None:
    """Its keys are options of both configs of every bundle, and both give the same grid."""
    preset = json.loads(path.read_text())
    for config in sorted(repository.glob("bundles/*/configs/inference.json")):
        known = set(json.loads(config.read_text()))
        assert set(preset) <= known, config
        training = config.with_name("train.json")
        assert set(preset) - {"crop"} <= set(json.loads(training.read_text())), training
    scan = np.zeros((40, 50, 45), np.float32)
    scan[5:30, 5:30, 5:30] = np.random.default_rng(0).uniform(1, 2, (25, 25, 25))
    io.write_scan(scan, np.diag([-4.0, -4, 4, 1]), tmp_path / "s.nii.gz")
    pair = LoadScansd()({"moving": str(tmp_path / "s.nii.gz"), "fixed": str(tmp_path / "s.nii.gz")})
    options = {"grid_size": preset["grid_size"]}
    work = AlignAndGridd(preset["spacing"], "none", crop=preset["crop"], **options)(pair)["fixed_work"]
    one = LoadScansd(("image",), ("label",))({"image": str(tmp_path / "s.nii.gz")})
    trained = ToTrainingGridd(preset["spacing"], **options)(one)["image"]
    if preset["grid_size"]:
        assert list(work.shape[1:]) == list(trained.shape[1:]) == preset["grid_size"]
    if preset["grid_size"] and not preset["crop"]:
        np.testing.assert_allclose(work.numpy(), trained.numpy(), atol=1e-5)
        assert work.max() > 0
