"""The picture of common/deploy/README.md: the phantom as two DICOM series, through `python -m common deploy run`.

python tests/bench/draw_deploy.py common/deploy/report.png. Needs the MONAI Deploy App SDK.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from common import phantom

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "common" / "deploy"))
from dicom_series import write_series  # noqa: E402

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        for seed, (role, spacing) in enumerate({"fixed": (2.5, 2.5, 3.0), "moving": (2.5, 2.5, 2.5)}.items()):
            size = (64, 76, 52)
            linear = nib.eulerangles.euler2mat(0.1 * seed, 0.05, -0.1) @ np.diag([-spacing[0], -spacing[1], spacing[2]])
            affine = nib.affines.from_matvec(linear, -linear @ ((np.array(size) - 1) / 2))
            scan = phantom.sample(size, affine, phantom.Deformation(seed, amplitude=8) if seed else None, seed=seed)[0]
            write_series(scan, affine, Path(name, role), patient="phantom", description=role)
        line = [sys.executable, "-m", "common", "deploy", "run", "--bundle", "sacb_net", "--output", f"{name}/out"]
        subprocess.run([*line, "--fixed", f"{name}/fixed", "--moving", f"{name}/moving"], cwd=ROOT, check=True)
        picture = Image.open(f"{name}/out/moving_to_fixed/report.png").convert("RGB")
        picture.quantize(128).save(sys.argv[1], optimize=True)
