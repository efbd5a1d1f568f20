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
import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402

from common import phantom  # noqa: E402
from common.run import example  # noqa: E402
from common.space import io  # noqa: E402


def axial(path: str | Path) -> tuple[np.ndarray, float]:
    """The middle axial slice, the person's left on the left and front up, and a pixel's height by its width."""
    array, affine = io.read_scan(path)
    image = nib.as_closest_canonical(nib.Nifti1Image(array[0], affine))
    across, up, _ = image.header.get_zooms()
    return np.rot90(image.get_fdata()[:, :, image.shape[2] // 2]), up / across


def draw(scans: list, labels: list, titles: list[str], output: str) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.6))
    for axis, scan, label, title in zip(axes, scans, labels, titles):
        (scan, aspect), (label, _) = axial(scan), axial(label)
        axis.imshow(scan, cmap="gray", aspect=aspect)
        shown = np.ma.masked_equal(label, 0)
        axis.imshow(shown, cmap="tab10", alpha=0.55, vmin=0, vmax=9, interpolation="nearest", aspect=aspect)
        for side, place in (("L", 0.03), ("R", 0.93)):
            axis.text(place, 0.9, side, color="white", transform=axis.transAxes)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    colours = {name: plt.get_cmap("tab10")(number) for number, name in phantom.LABELS.items()}
    handles = [plt.Line2D([], [], marker="s", ls="", color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="lower center", ncols=5, fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(output, dpi=80)


def main(output: str) -> None:
    from bench_label import ROOT, start
    from monailabel.client import MONAILabelClient

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        pair = example.write_phantom(place / "phantom")
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
        titles = ["atlas and its label", "patient, label from the server", "patient, true label"]
        labels = [pair["moving_label"], file, pair["fixed_label"]]
        draw([pair["moving"], pair["fixed"], pair["fixed"]], labels, titles, output)


if __name__ == "__main__":
    main(sys.argv[1])
