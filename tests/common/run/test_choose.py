"""What `--method auto` makes of scans: the rule on facts, and the facts of scans."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common import phantom
from common.run.choose import Facts, choose, facts_of
from common.space import io

BRAINS = Facts((False, False), (True, True), (1.3, 1.5), (214.0, 199.0), (0.63, 0.64), 0.5)
CROPS = Facts((False, False), (False, False), (0.06, 0.06), (50.0, 53.0), (0.57, 0.54), 0.7)
MIND = {"features": "mind", "refine_steps": 50}
CHEST = MIND | {"intensity_range": [-1000, 1000], "spacing": 3.0}


@pytest.mark.parametrize(
    "facts, bundle, config, options, words",
    [
        (BRAINS, "samconvex", "", {"refine_steps": 50}, "brains in T1 without skull"),
        (BRAINS._replace(alike=0.21), "samconvex", "", MIND | {"refine_similarity": "mind"}, "two contrasts"),
        (BRAINS._replace(litres=(4.1, 3.9)), "samconvex", "", MIND, "with its skull"),
        (BRAINS._replace(litres=(0.1, 0.1)), "samconvex", "", MIND, "nothing that weights here"),
        (BRAINS._replace(median=(0.3, 0.3)), "samconvex", "", MIND, "nothing that weights here"),
        (BRAINS._replace(ct=(True, True)), "samconvex", "", MIND | {"intensity_range": [-1000, 1000]}, "two CT"),
        (BRAINS._replace(ct=(True, True), side_mm=(290.0, 462.0)), "samconvex", "", CHEST, "field of 462 mm"),
        (BRAINS._replace(ct=(True, False)), "samconvex", "", MIND | {"refine_similarity": "mind"}, "a CT and another"),
        (CROPS, "residual_aligner", "hippocampus.json", {"refine_steps": 50}, "around a hippocampus"),
        (CROPS._replace(codes=(0, 1, 2)), "residual_aligner", "hippocampus.json", {"refine_steps": 50}, "hippocampus"),
        (CROPS._replace(codes=(0, 1, 7)), "samconvex", "", MIND | {"spacing": 1.0}, "nothing that weights here"),
        (CROPS._replace(lost=True, codes=(5,)), "samconvex", "", MIND | {"spacing": 1.0, "prealign": "rigid"}, "rigid"),
    ],
)
def test_rule(facts: Facts, bundle: str, config: str, options: dict, words: str) -> None:
    found = choose(facts)
    assert (found.bundle, found.config, found.options) == (bundle, config, options)
    assert words in found.reason


def test_facts(tmp_path: Path) -> None:
    """Of the phantom, as it is, with its contrast turned over, and as a CT."""
    size = (36, 44, 36)
    affine = nib.affines.from_matvec(np.diag([-5.0, 5, 5]), [90, -110, -90])
    scan, label = phantom.sample(size, affine)
    turned = np.where(scan > 0, scan.max() + 1 - scan, 0).astype(np.float32)
    for name, values in (("scan", scan), ("turned", turned), ("ct", scan / scan.max() * 2000 - 1000)):
        io.write_scan(values.astype(np.float32), affine, tmp_path / f"{name}.nii.gz")
    io.write_label(label, affine, tmp_path / "label.nii.gz")
    path = {name: str(tmp_path / f"{name}.nii.gz") for name in ("scan", "turned", "ct", "label")}
    same = facts_of(path["scan"], path["scan"], (path["label"],), mode="none")
    assert same.alike == pytest.approx(1) and same.stripped == (True, True) and not same.lost
    assert same.side_mm == (220.0, 220.0) and set(same.codes) == set(np.unique(label).tolist())
    assert same.litres[0] == pytest.approx((scan > 0).sum() * 125 / 1e6)
    assert facts_of(path["turned"], path["scan"], mode="none").alike < 0
    assert facts_of(path["ct"], path["ct"], mode="none").ct == (True, True)


def test_real_scans(development_data: Path) -> None:
    """Two contrasts are told from one, crops from heads, and a partial field of view from a whole one."""
    dev = development_data / "data" / "dev"
    brain = [str(dev / "brain_t1" / "images" / f"oasis_{n}.nii.gz") for n in (1000, 1107)]
    spine = [str(dev / "spine_t1_t2" / f"{name}.nii.gz") for name in ("t2", "t1w")]
    found = choose(facts_of(*brain))
    assert (found.bundle, found.options) == ("samconvex", {"refine_steps": 50})
    flair = str(dev / "brain_ms" / "patient07_FLAIR.nii.gz")
    assert choose(facts_of(brain[0], flair)).reason.startswith("two contrasts")
    found = choose(facts_of(*spine))
    assert found.options["prealign"] == "rigid" and found.options["refine_similarity"] == "mind"
    crops = sorted(map(str, (dev / "hippocampus_mr" / "images").glob("*.nii.gz")))[:2]
    assert choose(facts_of(*crops)).config == "hippocampus.json"
    chest = sorted(map(str, (dev / "chest_ct" / "images").glob("*.nii.gz")))
    assert choose(facts_of(*chest)).options == CHEST
