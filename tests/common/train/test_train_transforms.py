"""Training scans come onto one grid."""

from pathlib import Path

import numpy as np
import torch
from grids import PLAIN, grid, write_pair

from common.run.transforms import LoadScansd
from common.train.transforms import ToTrainingGridd


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
