"""Pairs registered in this process: same numbers as `monai.bundle run`, weights loaded once, nothing left behind."""

import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from people import SPACING, label_of, write_person

from common import InputError
from common.run.cli import bundle_folder, sentence_of
from common.run.given import as_file
from common.run.registrar import Registrar
from common.space import io

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("people")
    for seed, name in enumerate(("a", "b")):
        write_person(folder, name, seed)
    return folder


@pytest.fixture(scope="module")
def registrar() -> Registrar:
    return Registrar(bundle_folder("sacb_net"), device="cpu", spacing=SPACING)


def test_equals_the_command(people: Path, tmp_path: Path, registrar: Registrar) -> None:
    pair = {"moving": people / "a.nii.gz", "fixed": people / "b.nii.gz", "moving_label": label_of(people, "a")}
    options = {"refine_steps": 3, "prealign": "rigid", "save_inverse": True}
    words = [f"--{name}={value}" for name, value in (pair | options | {"spacing": SPACING, "device": "cpu"}).items()]
    where = ["--config_file", "bundles/sacb_net/configs/inference.json", "--bundle_root", "bundles/sacb_net"]
    line = [sys.executable, "-m", "monai.bundle", "run", *where, *words, "--output_dir", str(tmp_path / "command")]
    subprocess.run(line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    found = registrar.register(output_dir=tmp_path / "here", **pair, **options)
    row, folder = found.row, found.folder
    assert folder == tmp_path / "here" / "a_to_b" and row["id"] == "a_to_b"
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in (tmp_path / "command" / "a_to_b").iterdir()}
    assert {"warped.nii.gz", "warped_label.nii.gz", "inverse_transform.h5", "report.json"} <= names
    for name in ("warped.nii.gz", "warped_label.nii.gz", "displacement.nii.gz"):
        mine, theirs = (itk.imread(str(tmp_path / where / "a_to_b" / name)) for where in ("here", "command"))
        np.testing.assert_array_equal(itk.array_from_image(mine), itk.array_from_image(theirs), err_msg=name)
        np.testing.assert_array_equal(io.affine_of(mine), io.affine_of(theirs), err_msg=name)


def test_weights_are_kept(people: Path, tmp_path: Path, registrar: Registrar) -> None:
    before = list(sys.path)
    networks = []
    for options in ({}, {"refine_steps": 1, "passes": 2, "threads": 2}, {"intensity_range": [0, 1]}):
        found = registrar.register(people / "a.nii.gz", people / "b.nii.gz", tmp_path / str(len(networks)), **options)
        networks.append(registrar._kept[1])
        run = json.loads((found.folder / "report.json").read_text())["run"]
        assert run["threads"] == options.get("threads", 1) and torch.get_num_threads() == 1
    assert networks[0] is networks[1], "refinement and passes need no other network"
    assert networks[2] is not networks[0], "an option that is not known to leave the network alone"
    assert sys.path == before
    gc.collect()
    assert sum(type(thing).__name__ == "SACBNet" for thing in gc.get_objects()) <= 3


def test_problems(people: Path, tmp_path: Path, registrar: Registrar) -> None:
    with pytest.raises(Exception) as caught:
        registrar.register(people / "none.nii.gz", people / "b.nii.gz", tmp_path / "out")
    assert sentence_of(caught.value) == f"{people / 'none.nii.gz'}: no such file"
    with pytest.raises(InputError, match="--refine_step: there is no such option, did you mean --refine_steps?"):
        registrar.register(people / "a.nii.gz", people / "b.nii.gz", tmp_path / "out", refine_step=3)
    for text in ("$exit()", "@network", "%none.json"):
        with pytest.raises(InputError, match="--refine_similarity must be one of"):
            registrar.register(people / "a.nii.gz", people / "b.nii.gz", tmp_path / "out", refine_similarity=text)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="not a bundle, it has no configs/inference.json"):
        Registrar(tmp_path)
    with pytest.raises(InputError, match="none: no such bundle, .*; there are dual_flownet, .*, samconvex"):
        bundle_folder("none")


def test_in_memory_is_as_from_files(
    people: Path, tmp_path: Path, registrar: Registrar, capfd: pytest.CaptureFixture
) -> None:
    """Arrays, tensors and images give what their files give, silently, and nothing is written without a folder."""
    files = {name: people / f"{name}.nii.gz" for name in ("a", "b")}
    arrays = {name: io.read_scan(path) for name, path in files.items()}
    label = io.read_label(label_of(people, "a"))
    truth = registrar.register(files["a"], files["b"], tmp_path / "files", moving_label=label_of(people, "a"))
    capfd.readouterr()
    here = set(Path.cwd().iterdir())
    kinds = {
        "array and affine": lambda name: arrays[name],
        "nibabel": lambda name: nib.load(files[name]),
        "ITK": lambda name: itk.imread(str(files[name])),
        "tensor": lambda name: MetaTensor(arrays[name][0], affine=torch.from_numpy(arrays[name][1])),
    }
    if importlib.util.find_spec("SimpleITK"):
        kinds["SimpleITK"] = lambda name: importlib.import_module("SimpleITK").ReadImage(str(files[name]))
    for kind, scan in kinds.items():
        array, affine = io.read_scan(as_file("moving", scan("a"), tmp_path))
        np.testing.assert_array_equal(array, arrays["a"][0], err_msg=kind)
        np.testing.assert_allclose(affine, arrays["a"][1], atol=1e-4, err_msg=kind)
    found = registrar.register(arrays["a"], arrays["b"], moving_label=label)
    assert capfd.readouterr() == ("", "")
    np.testing.assert_array_equal(found.warped, truth.warped)
    np.testing.assert_array_equal(found.warped_label, truth.warped_label)
    assert found.folder is None and found.row["moving"] == found.row["fixed"] == "in memory"
    assert set(Path.cwd().iterdir()) == here
    assert found.verdict == truth.verdict == ("doubtful" if truth.row["warnings"] else "plausible")
    written = itk.array_from_image(itk.imread(str(truth.folder / "displacement.nii.gz")))
    lps = np.transpose(written, (3, 2, 1, 0)) * np.array([-1, -1, 1]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(truth.displacement, lps, atol=1e-3)


@pytest.mark.parametrize(
    "scan, sentence",
    [
        (np.ones((4, 4, 4)), "moving: an array alone does not say where it is; give (array, affine)"),
        ((np.ones((4, 4)), np.eye(4)), "moving: must be (I, J, K) or (C, I, J, K) with a 4 x 4 affine, got (4, 4)"),
        (3, "moving: must be a path, (array, affine), a tensor with an affine, or an image of nibabel, SimpleITK"),
    ],
)
def test_what_is_no_scan(people: Path, registrar: Registrar, scan: object, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        registrar.register(scan, people / "b.nii.gz")
    assert str(caught.value).startswith(sentence)
