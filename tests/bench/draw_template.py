"""common/run/template.png: a template of four made-up people, whose anatomy is one and whose shapes differ.

    python tests/bench/draw_template.py [OUT.png] [--spacing 3] [--count 4] [--steps 10]
"""

import shutil
import sys
import tempfile
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
from machine import ROOT

sys.path.insert(0, str(ROOT))
from common import phantom  # noqa: E402
from common.run.template import make_template  # noqa: E402
from common.space import io  # noqa: E402


def main(output: str = str(ROOT / "common" / "run" / "template.png"), spacing=3, count=4, steps=10) -> None:
    size = tuple(int(n) for n in np.ceil(np.array([176, 208, 168]) / spacing))
    affine = nib.affines.from_matvec(np.eye(3) * spacing, -spacing * (np.array(size) - 1) / 2)
    with tempfile.TemporaryDirectory() as folder:
        scans = Path(folder) / "scans"
        scans.mkdir()
        for n in range(count):
            deformation = phantom.Deformation(n + 1, amplitude=30)
            io.write_scan(phantom.sample(size, affine, deformation, seed=n)[0], affine, scans / f"{n}.nii.gz")
        options = {"method": "samconvex", "features": "mind", "refine_steps": steps, "device": "cpu"}
        out = make_template(scans, Path(folder) / "out", rounds=2, **options)
        shutil.copy(out / "template.png", output)


if __name__ == "__main__":
    fire.Fire(main)
