"""The picture of common/label/README.md: the phantom's labels, propagated through a real server.

python tests/bench/draw_label.py common/label/propagation.png. Needs MONAI Label.
"""

import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from bench_label import ROOT, start  # noqa: E402
from monailabel.client import MONAILabelClient  # noqa: E402

from common import io, phantom  # noqa: E402


def main(output: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        pair = phantom.write_phantom(place / "phantom")
        (place / "studies" / "labels" / "final").mkdir(parents=True)
        for role, scan in (("moving", "atlas"), ("fixed", "patient")):
            shutil.copy(pair[role], place / "studies" / f"{scan}.nii.gz")
        shutil.copy(pair["moving_label"], place / "studies" / "labels" / "final" / "atlas.nii.gz")
        init = [sys.executable, "-m", "common", "label", "init", str(place / "app"), "--bundles", "sacb_net"]
        subprocess.run(init, cwd=ROOT, check=True)
        server, address = start(place / "app", place / "studies")
        try:
            client = MONAILabelClient(address, tmpdir=name)
            file, _ = client.infer("sacb_net_propagate", "patient", {"moving": "atlas"})
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        scans = [pair["moving"], pair["fixed"], pair["fixed"]]
        labels = [pair["moving_label"], file, pair["fixed_label"]]
        titles = ["atlas and its label", "patient, label from the server", "patient, true label"]
        figure, axes = plt.subplots(1, 3, figsize=(9, 3.4))
        for axis, scan, label, title in zip(axes, scans, labels, titles):
            scan, label = (
                np.rot90(io.read_scan(x)[0][0][:, :, io.read_scan(x)[0].shape[3] // 2]) for x in (scan, label)
            )
            axis.imshow(scan, cmap="gray")
            axis.imshow(np.ma.masked_equal(label, 0), cmap="tab10", alpha=0.55, vmin=0, vmax=9, interpolation="nearest")
            axis.set_title(title, fontsize=9)
            axis.axis("off")
        figure.tight_layout()
        figure.savefig(output, dpi=80)


if __name__ == "__main__":
    main(sys.argv[1])
