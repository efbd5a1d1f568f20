"""report.png and summary.png: a registration at a glance, and a cohort at a glance."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, TwoSlopeNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from scipy.ndimage import gaussian_filter

from common.fields import jacobian_determinant
from common.ops import warp
from common.quality.measure import Registration

PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))
ORANGE, BLUE, YELLOW, GREY = "#E69F00", "#0072B2", "#F0E442", "#999999"  # Okabe and Ito: told apart by everybody
ENDS = (("L", "R", "P", "A"), ("L", "R", "I", "S"), ("P", "A", "I", "S"))  # left, right, bottom, top of each plane
TILES = 8  # of the checkerboard, along the longer side
WIDTH = 190  # letters of a line of the headline
LINES = 24  # of the deformation grid, along the longer side
MEASURES = {  # name in a row -> words, wanted direction
    "ncc": ("correlation", "higher is better"),
    "dice": ("Dice", "higher is better"),
    "hd95": ("HD95 (mm)", "lower is better"),
    "tre_mm": ("TRE (mm)", "lower is better"),
}


def draw_report(pair: Registration, row: dict, warnings: list[str], path: Path) -> None:
    """Three planes through the fixed foreground, on the working grid (closest RAS), under the verdict in large letters.

    Columns: fixed scan; pre-aligned moving and warped scan with contours of the fixed one (they should follow edges);
    checkerboard of warped and fixed scan (edges should go on across tiles); deformed grid; Jacobian determinant (white
    1, orange growth, purple shrinkage, yellow folds) with the outline of the fixed scan.
    """
    moving, fixed = (half[:1] for half in pair.work.float().chunk(2))
    warped = warp(moving[None], pair.disp[None])[0]
    determinant = jacobian_determinant(pair.disp[None])[0, 0].numpy()
    moving, fixed, warped = (scan[0].numpy() for scan in (moving, fixed, warped))
    middle = [int(round(float(axis.float().mean()))) for axis in pair.inside.nonzero().T]
    titles = (
        "fixed",
        "before: moving + fixed contours",
        "after: warped + fixed contours",
        "checkerboard",
        "deformed grid",
        "Jacobian determinant",
    )
    whole = Figure(figsize=(18, 10.9 + 0.3 * len(warnings)), layout="constrained")
    head, figure = whole.subfigures(2, 1, height_ratios=[1.1 + 0.3 * len(warnings), 9.8])
    _headline(head, row, warnings)
    axes = figure.subplots(3, 6, squeeze=False)
    top = max(float(fixed.max()), 1e-6)
    for axis_row, (plane, normal), ends in zip(axes, PLANES, ENDS):
        cut = [slice(None)] * 3
        cut[normal] = middle[normal]
        f, m, w, j = (scan[tuple(cut)] for scan in (fixed, moving, warped, determinant))
        u = np.delete(pair.disp.numpy()[(slice(None), *cut)], normal, axis=0)
        for axes_, scan in zip(axis_row, (f, m, w, _checkerboard(f, w))):
            axes_.imshow(scan.T, cmap="gray", origin="lower", vmin=0, vmax=top)
        for axes_ in axis_row[1:3]:
            _contours(axes_, f, top)
        _grid(axis_row[4], f, u, top)
        shown = _jacobian(axis_row[5], j)
        _contours(axis_row[5], f, top, levels=1, colour="black")
        axis_row[0].set_ylabel(f"{plane}, slice {middle[normal]}", fontsize=11)
        for (x, y), letter in zip(((0.03, 0.5), (0.97, 0.5), (0.5, 0.03), (0.5, 0.97)), ends):
            place = {"transform": axis_row[0].transAxes, "ha": "center", "va": "center"}
            box = {"facecolor": "black", "linewidth": 0, "pad": 1.5}
            axis_row[0].text(x, y, letter, color=ORANGE, fontsize=11, bbox=box, **place)
        for axes_ in axis_row:
            axes_.set(xticks=[], yticks=[], xlim=(-0.5, f.shape[0] - 0.5), ylim=(-0.5, f.shape[1] - 0.5))
    for axes_, title in zip(axes[0], titles):
        axes_.set_title(title, fontsize=11)
    figure.colorbar(shown, ax=axes[:, 5], shrink=0.6, label="below 1 shrinks, above 1 grows; yellow: folds")
    whole.savefig(path, dpi=80, format="png")


def _headline(figure: SubFigure, row: dict, warnings: list[str]) -> None:
    """The verdict on a bar: blue with a tick, or orange with a cross and the reasons; and what was measured."""
    parts = [
        f"{words} {row[f'{name}_before']:.3f} -> {row[f'{name}_after']:.3f}"
        for name, (words, _) in MEASURES.items()
        if row.get(f"{name}_after") is not None
    ]
    parts.append(f"folding {row['folding_pct']:.2f} %")
    colour, ink = (ORANGE, "black") if warnings else (BLUE, "white")
    figure.set_facecolor(colour)
    words = "\N{MULTIPLICATION X} DOUBTFUL" if warnings else "\N{CHECK MARK} plausible: nothing out of the ordinary"
    height = 1.1 + 0.3 * len(warnings)  # inches, of the whole bar
    figure.text(0.01, 1 - 0.1 / height, words, fontsize=20, weight="bold", color=ink, va="top")
    measured = f"{row.get('id', '')}:  {'; '.join(parts)}"
    figure.text(0.01, 1 - 0.6 / height, measured, fontsize=13, color=ink, va="top")
    for n, warning in enumerate(warnings):
        line = f"- {textwrap.shorten(warning, WIDTH, placeholder=' ...')}"
        figure.text(0.01, 1 - (0.9 + 0.3 * n) / height, line, fontsize=13, color=ink, va="top")


def _checkerboard(fixed: np.ndarray, warped: np.ndarray) -> np.ndarray:
    side = max(max(fixed.shape) // TILES, 1)
    i, j = np.indices(fixed.shape) // side
    return np.where((i + j) % 2 == 0, fixed, warped)


def _contours(axes: Axes, scan: np.ndarray, top: float, *, levels: int = 2, colour: str = ORANGE) -> None:
    """The outline of a scan, and with two levels also its inner edges."""
    heights = [0.1 * top, 0.55 * top][:levels]
    if scan.max() > scan.min():
        axes.contour(gaussian_filter(scan, 0.7).T, levels=heights, colors=colour, linewidths=[1.3, 0.8][:levels])


def _grid(axes: Axes, scan: np.ndarray, disp: np.ndarray, top: float) -> None:
    """Lines of the fixed grid, carried by the displacement within the plane."""
    axes.imshow(scan.T, cmap="gray_r", origin="lower", vmin=0, vmax=2.5 * top)  # light, so that the lines stand out
    step = max(max(scan.shape) // LINES, 1)
    x, y = np.indices(scan.shape) + disp
    for n in range(0, scan.shape[0], step):
        axes.plot(x[n], y[n], color=BLUE, linewidth=0.7)
    for n in range(0, scan.shape[1], step):
        axes.plot(x[:, n], y[:, n], color=BLUE, linewidth=0.7)


def _jacobian(axes: Axes, determinant: np.ndarray):
    shown = axes.imshow(determinant.T, cmap="PuOr_r", origin="lower", norm=TwoSlopeNorm(1.0, 0.0, 2.0))
    folds = np.where(determinant <= 0, 1.0, np.nan)
    axes.imshow(folds.T, cmap=ListedColormap([YELLOW]), origin="lower")
    return shown


def draw_summary(rows: list[dict], path: Path) -> None:
    """A cohort: every measure of every pair before and after, folding, and the pairs that failed or are doubtful."""
    rows = [{name: value for name, value in row.items() if value != ""} for row in rows]  # as read from a table
    done = [row for row in rows if row.get("ncc_after") is not None]
    names = [name for name in MEASURES if any(row.get(f"{name}_after") is not None for row in done)]
    figure = Figure(figsize=(4 * (len(names) + 1), max(3.5, 0.22 * len(rows) + 1.8)), layout="constrained")
    axes = figure.subplots(1, len(names) + 1, sharey=True, squeeze=False)[0]
    ids = [str(row["id"]) for row in rows]
    for axes_, name in zip(axes, names):
        for n, row in enumerate(rows):
            before, after = row.get(f"{name}_before"), row.get(f"{name}_after")
            if before is not None and after is not None:
                axes_.plot([before, after], [n, n], color=GREY, linewidth=1, zorder=1)
                axes_.scatter(before, n, s=26, facecolor="white", edgecolor=BLUE, zorder=2)
                axes_.scatter(after, n, s=26, color=BLUE, zorder=3)
        axes_.set_xlabel(f"{MEASURES[name][0]}, {MEASURES[name][1]}")
    for n, row in enumerate(rows):
        if row.get("folding_pct") is not None:
            axes[-1].barh(n, row["folding_pct"], color=GREY)
        if row.get("error") or row.get("warnings"):
            colour, words = ("black", "failed") if row.get("error") else (ORANGE, "doubtful")
            axes[0].add_patch(
                Rectangle((0, n - 0.5), 1, 1, transform=axes[0].get_yaxis_transform(), color=colour, alpha=0.15)
            )
            axes[-1].text(0.98, n, words, transform=axes[-1].get_yaxis_transform(), ha="right", va="center", fontsize=8)
    axes[-1].set_xlabel("folding (%)")
    axes[0].set(yticks=range(len(rows)), yticklabels=ids, ylim=(len(rows) - 0.5, -0.5))
    axes[0].tick_params(axis="y", labelsize=7)
    failed = sum(bool(row.get("error")) for row in rows)
    doubtful = sum(bool(row.get("warnings")) for row in done)
    text = f"{len(done)} pairs registered, {failed} failed, {doubtful} doubtful; open circle before, full circle after"
    figure.suptitle(text, fontsize=11)
    figure.savefig(path, dpi=80, format="png")
