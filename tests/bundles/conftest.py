"""Synthetic people, on one grid and as scanned."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import SPACING, centred, write

from common import phantom
from common.space import io


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five people on one grid: three to train, two to validate in both directions."""
    folder = tmp_path_factory.mktemp("dataset")
    size = (32, 40, 32)
    for seed in range(5):
        person = phantom.Deformation(seed, amplitude=12)
        person.matrix, person.shift = np.eye(3), np.zeros(3)
        write(folder, f"p{seed}", size, centred(size, np.diag([SPACING] * 3)), seed, person)
    cases = [{"id": f"p{n}", "image": f"p{n}.nii.gz", "label": f"p{n}_label.nii.gz"} for n in range(5)]
    pairs = [{"moving": f"p{a}", "fixed": f"p{b}", "kind": "inter-subject"} for a, b in ((3, 4), (4, 3))]
    content = {"training": cases[:3], "validation": cases[3:], "registration_pairs": pairs}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An oblique, anisotropic moving and a flipped fixed scan with labels, and the ways to get it wrong."""
    folder = tmp_path_factory.mktemp("raw")
    turned = nib.eulerangles.euler2mat(0.3, -0.2, 0.15) @ np.diag([4.0, 4.5, 5])
    write(folder, "moving", (46, 44, 36), centred((46, 44, 36), turned), 1, phantom.Deformation(0))
    write(folder, "fixed", (40, 46, 36), centred((40, 46, 36), np.diag([-4.0, -4, 4.2])), 0)
    (folder / "pairs.csv").write_text(
        "fixed,moving,fixed_label,moving_label\n"
        "fixed.nii.gz,moving.nii.gz,fixed_label.nii.gz,moving_label.nii.gz\n"
        "moving.nii.gz,fixed.nii.gz,,\n"
    )
    (folder / "empty.csv").write_text("fixed,moving\n")
    half = np.zeros((40, 46, 36))
    half[:18] = 1
    for name, mask in (("left", half), ("right", half[::-1])):
        io.write_label(mask, io.read_scan(folder / "fixed.nii.gz")[1], folder / f"{name}.nii.gz")
    io.write_scan(np.full((20, 20, 20), 3, np.float32), np.eye(4), folder / "constant.nii.gz")
    torch.save(torch.nn.Conv3d(2, 3, 3).state_dict(), folder / "other.pt")
    colour = np.random.default_rng(0).random((3, 20, 20, 20), dtype=np.float32)
    io.write_scan(colour, np.eye(4), folder / "colour.nrrd")
    io.write_scan(colour[:1], np.eye(4), folder / "plain.nii.gz")
    io.write_label(np.ones((10, 20, 20)), np.eye(4), folder / "smaller.nii.gz")
    io.write_scan(np.where(colour[:1] > 2, 0, np.nan), np.eye(4), folder / "nan.nii.gz")
    nib.save(nib.Nifti1Image(colour.transpose(1, 2, 3, 0), np.eye(4)), folder / "film.nii.gz")
    away = nib.affines.from_matvec(np.eye(3), [900, 0, 0])
    io.write_scan(colour[:1], away, folder / "away.nii.gz")
    (folder / "text.nii.gz").write_text("no image")
    return folder
