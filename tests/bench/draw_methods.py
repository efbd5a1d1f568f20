"""The pictures of the model cards and of the README: a registration before and after, on a dark ground.

    python tests/bench/draw_methods.py phantom sacb_net     # bundles/sacb_net/docs/result.png
    python tests/bench/draw_methods.py real DATA            # common/registration.png

Both run the bundle's inference.json in a folder of its own and draw what it has written there: the warped scan, the
transform and the numbers of report.json. Further options go to that run, as --spacing 4.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import fire
import matplotlib
import nibabel as nib
import numpy as np
from machine import ROOT, one_thread
from PIL import Image

sys.path.insert(0, str(ROOT))
matplotlib.use("Agg")
from matplotlib import patheffects  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from scipy.ndimage import gaussian_filter  # noqa: E402

from common.quality.measure import read_registration  # noqa: E402
from common.quality.picture import ENDS, ORANGE, PLANES  # noqa: E402
from common.space import geometry, io  # noqa: E402

SKY, GREY = "#56B4E9", "#BBBBBB"  # Okabe and Ito's light blue, which stands out on black
AXIAL, SAGITTAL = 0, 2  # of PLANES and ENDS
LINES = 24  # of the deformation grid, along the longer side
MARGIN = 0.05  # of the longest side, around the fixed scan's foreground
STYLE = {"figure.facecolor": "black", "axes.facecolor": "black", "savefig.facecolor": "black", "font.size": 20}
STYLE |= {name: "white" for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")}
REAL = {  # beneath DATA; both scans may be shown with their credit
    "moving": "brain_ms/patient07_T1.nii.gz",
    "fixed": "brain_glioma/t1_bet.nii.gz",
    "credit": "Scans: fixed TCGA-LGG, The Cancer Imaging Archive, CC BY 3.0; moving Lesjak et al. 2017, CC BY",
}


def register(bundle: str, folder: str, given: dict, options: dict) -> tuple[Path, dict]:
    """Run the bundle's inference.json on the files given; its folder of results, and its report."""
    root = ROOT / "bundles" / bundle
    line = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(root / "configs" / "inference.json")]
    options = {"bundle_root": root, "output_dir": folder, "device": "cpu"} | given | options
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    subprocess.run([*line, *words], check=True, env=one_thread() | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    (path,) = Path(folder).glob("*/report.json")
    return path.parent, json.loads(path.read_text())


class Drawing:
    """The scans of a registration on the fixed scan's grid, turned to closest RAS, and what is drawn of them."""

    def __init__(self, results: Path, report: dict) -> None:
        pair = read_registration(report["moving"], report["fixed"], str(results / "transform.h5"))
        margin = round(MARGIN * max(pair.disp.shape))
        around = [(0, 0), *[(margin, margin)] * 3]
        self.onto = pair.work_affine @ nib.affines.from_matvec(np.eye(3), [-margin] * 3)
        self.before, self.fixed = np.pad(pair.work.numpy(), around)
        self.disp = np.pad(pair.disp.numpy(), around, mode="edge")
        self.range = geometry.foreground_range(pair.moving[0])
        self.after = self.resampled(results / "warped.nii.gz")
        self.edge = 1.5 / np.linalg.norm(self.onto[:3, 0])  # mm -> voxels
        self.middle = [margin + round(float(axis.float().mean())) for axis in pair.inside.nonzero().T]

    def resampled(self, path: str | Path) -> np.ndarray:
        """Another scan in the moving one's grey values, as it lies in space."""
        (scan, affine), (low, high) = io.read_scan(path), self.range
        values = geometry.to_working_grid(scan[:1], affine, self.fixed.shape, self.onto)[0]
        return np.clip((values - low) / (high - low), 0, 1)

    def cut(self, volume: np.ndarray, plane: int) -> np.ndarray:
        normal = PLANES[plane][1]
        return np.take(volume, self.middle[normal], axis=normal)

    def panel(self, axes, plane: int, scan: np.ndarray, *, contours: bool = False, letters: bool = False) -> None:
        self._show(axes, self.cut(scan, plane), cmap="gray", vmin=0, vmax=1)
        if contours:  # outline of the fixed scan, and its inner edges
            smooth = gaussian_filter(self.cut(self.fixed, plane), self.edge)
            axes.contour(smooth.T, levels=[0.12, 0.5], colors=ORANGE, linewidths=[2.2, 1.6])
        if letters:
            for (x, y), letter in zip(((0.04, 0.5), (0.96, 0.5), (0.5, 0.05), (0.5, 0.95)), ENDS[plane]):
                place = {"transform": axes.transAxes, "ha": "center", "va": "center"}
                around = [patheffects.withStroke(linewidth=5, foreground="black")]
                axes.text(x, y, letter, color=ORANGE, weight="bold", path_effects=around, **place)

    def difference(self, axes, plane: int, scan: np.ndarray) -> None:
        self._show(axes, np.abs(self.cut(scan - self.fixed, plane)), cmap="inferno", vmin=0, vmax=0.6)

    def grid(self, axes, plane: int) -> None:
        """Lines of the fixed grid, carried by the displacement within the plane."""
        scan, normal = self.cut(self.fixed, plane), PLANES[plane][1]
        self._show(axes, scan, cmap="gray", vmin=0, vmax=2)
        u = np.stack([self.cut(part, plane) for axis, part in enumerate(self.disp) if axis != normal])
        x, y = np.indices(scan.shape) + u
        step = max(max(scan.shape) // LINES, 1)
        for lines, other in ((x, y), (x.T, y.T)):
            axes.plot(lines[::step].T, other[::step].T, color=SKY, linewidth=1.4)

    def _show(self, axes, image: np.ndarray, **how) -> None:
        axes.imshow(image.T, origin="lower", interpolation="bicubic", **how)
        axes.set(xticks=[], yticks=[], xlim=(-0.5, image.shape[0] - 0.5), ylim=(-0.5, image.shape[1] - 0.5))
        axes.set_frame_on(False)


def landmarks(axes, each: list[dict]) -> None:
    """A line a landmark: open circle before, full circle after; orange where it has become worse."""
    for n, row in enumerate(sorted(each, key=lambda row: row["tre_mm_before"])):
        before, after = row["tre_mm_before"], row["tre_mm_after"]
        colour = ORANGE if after > before else SKY
        axes.plot([before, after], [n, n], color=colour, linewidth=3)
        axes.scatter(before, n, s=150, facecolor="black", edgecolor=colour, linewidth=3, zorder=2)
        axes.scatter(after, n, s=150, color=colour, zorder=3)
    axes.set(yticks=[], xlim=(0, None), xlabel="mm (open: before)")
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)


def finish(figure, output: str | Path, colours: int) -> None:
    """Save with a palette: a third of the size."""
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    picture.quantize(colours, dither=Image.Dither.NONE).save(output, optimize=True)
    plt.close(figure)


def draw_phantom(drawing: Drawing, report: dict, title: str, output: str | Path) -> None:
    """Two rows: the scans, the last two with the fixed scan's contours; grid, differences, landmarks."""
    figure, axes = plt.subplots(2, 4, figsize=(16, 10.4), dpi=90, layout="constrained")
    figure.suptitle(title, fontsize=24)
    scans = {"fixed": drawing.fixed, "moving, as it lies": drawing.resampled(report["moving"])}
    scans |= {"before: aligned": drawing.before, "after: warped": drawing.after}
    for n, (axes_, (name, scan)) in enumerate(zip(axes[0], scans.items())):
        drawing.panel(axes_, AXIAL, scan, contours=n > 1, letters=n == 0)
        axes_.set_title(name, fontsize=22)
    drawing.grid(axes[1, 0], AXIAL)
    drawing.difference(axes[1, 1], AXIAL, drawing.before)
    drawing.difference(axes[1, 2], AXIAL, drawing.after)
    landmarks(axes[1, 3], report["landmarks"]["each"])
    for axes_, name in zip(axes[1], ("deformed grid", "difference before", "difference after", "landmark errors")):
        axes_.set_title(name, fontsize=22)
    finish(figure, output, 128)


def draw_real(drawing: Drawing, title: str, credit: str, output: str | Path) -> None:
    """Two planes: fixed scan, moving one before and after with the fixed scan's contours, grid; the credit below."""
    heights = drawing.fixed.shape[1:]  # of an axial panel, from back to front, and of a sagittal one, upwards
    figure, axes = plt.subplots(2, 4, figsize=(16, 9), dpi=90, layout="constrained", height_ratios=heights)
    figure.suptitle(title, fontsize=24)
    figure.supxlabel(credit, fontsize=19, color=GREY)
    for row, plane in zip(axes, (AXIAL, SAGITTAL)):
        drawing.panel(row[0], plane, drawing.fixed, letters=True)
        drawing.panel(row[1], plane, drawing.before, contours=True)
        drawing.panel(row[2], plane, drawing.after, contours=True)
        drawing.grid(row[3], plane)
    for axes_, name in zip(axes[0], ("fixed", "moving, before", "moving, after", "deformed grid")):
        axes_.set_title(name, fontsize=22)
    finish(figure, output, 64)


def draw(bundle: str, given: dict, options: dict, drawn: Callable, output: str | Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        results, report = register(bundle, folder, given, options)
        print(f"{drawn(Drawing(results, report), report)}; wrote {output}")


def phantom(bundle: str, output: str | None = None, **options) -> None:
    """The embedded pair by a bundle: bundles/BUNDLE/docs/result.png."""
    root = ROOT / "bundles" / bundle
    output = output or root / "docs" / "result.png"
    name = json.loads((root / "configs" / "metadata.json").read_text())["name"]

    def drawn(drawing: Drawing, report: dict) -> str:
        marks = report["landmarks"]
        title = f"{name}: landmark error {marks['tre_mm_before']:.2f} mm before, {marks['tre_mm_after']:.2f} mm after; "
        title += f"folding {report['deformation']['folding_pct']:.2f} %"
        draw_phantom(drawing, report, title, output)
        return title

    draw(bundle, {}, options, drawn, output)


def real(data: str, output: str | None = None, **options) -> None:
    """Two people's brains by SAMConvex without trained weights: common/registration.png."""
    output = output or ROOT / "common" / "registration.png"
    given = {role: Path(data).absolute() / REAL[role] for role in ("moving", "fixed")}
    given |= {"features": "mind", "refine_steps": 50}

    def drawn(drawing: Drawing, report: dict) -> str:
        ncc = [f"{report['similarity'][f'ncc_{when}']:.2f}" for when in ("before", "after")]
        title = f"SAMConvex, nothing trained: correlation {ncc[0]} before, {ncc[1]} after; "
        title += f"folding {report['deformation']['folding_pct']:.2f} %"
        draw_real(drawing, title, REAL["credit"], output)
        return title

    draw("samconvex", given, options, drawn, output)


if __name__ == "__main__":
    plt.rcParams.update(STYLE)
    fire.Fire({"phantom": phantom, "real": real})
