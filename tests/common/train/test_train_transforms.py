"""Training scans come onto one grid; what a validation makes of its pairs."""

from pathlib import Path

import numpy as np
import torch
from grids import PLAIN, grid, write_pair
from monai.data import MetaTensor

from common.run.transforms import LoadScansd
from common.train.transforms import PseudoT2d, ToTrainingGridd, WarpPaird


def test_training_grid_is_that_of_the_reference(tmp_path: Path) -> None:
    """Aligned scans come onto one grid, on which they overlap better than before; the reference is not moved."""
    paths = write_pair(tmp_path, grid((46, 52, 44), np.diag([4, 4, 4]), (0.3, -0.2, 0.1)), PLAIN)
    reference = str(paths["fixed"])
    grids = ToTrainingGridd(spacing=4.0, prealign="affine", reference=reference)
    load = LoadScansd(keys=("image",), label_keys=("label",))
    fixed, moving = (
        grids(load({"image": str(paths[role]), "label": str(paths[f"{role}_label"])})) for role in ("fixed", "moving")
    )
    assert torch.equal(fixed["image"], load({"image": reference})["image"])
    assert torch.equal(moving["image"].affine, fixed["image"].affine)
    both = ((moving["label"] > 0) & (fixed["label"] > 0)).sum()
    assert 2 * both / ((moving["label"] > 0).sum() + (fixed["label"] > 0).sum()) > 0.9


def test_contrast_is_turned_label_by_label() -> None:
    """Means 0.2 and 0.8 become 0.8 and 0.2, what is brighter within a label becomes darker by half; 0 stays."""
    scan = MetaTensor(torch.tensor([0, 0.1, 0.3, 0.7, 0.9, 0]).view(1, 6, 1, 1), meta={"filename_or_obj": "a.nii"})
    label = MetaTensor(torch.tensor([0, 4, 4, 9, 9, 9]).view(1, 6, 1, 1))
    turned = PseudoT2d()({"moving": scan, "moving_label": label, "fixed": scan})
    expected = torch.tensor([0, 0.85, 0.75, 0.25, 0.15, 0])
    torch.testing.assert_close(turned["moving"].as_tensor().flatten(), expected)
    assert turned["fixed"] is scan and turned["moving"].meta["filename_or_obj"] == "a.nii"
    plain = PseudoT2d()({"moving": scan})["moving"].as_tensor().flatten()
    torch.testing.assert_close(plain, torch.tensor([0, 0.7, 0.6, 0.4, 0.3, 0]))


def test_warped_pair_repeats_its_set() -> None:
    image = torch.rand(2, 3, 3, 3)
    data = {"image": image, "pred": torch.zeros(3, 3, 3, 3), "kind": "turned"}
    done = WarpPaird()(data)
    assert done["set"] == "turned" and torch.equal(done["warped"], image[:1]) and "warped_label" not in done
