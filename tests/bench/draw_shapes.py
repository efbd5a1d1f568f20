"""Pairs of made-up anatomy to look at, as a training on shapes sees them.

    python tests/bench/draw_shapes.py OUT.png [--size "[48,48,48]"] [--seed 0] [--count 12]

A row has three pairs; of each the middle slice of moving, fixed, fixed labels, moving labels warped by the known
displacement (which should be the same), and that displacement as a grid.
"""

import sys

import fire
import matplotlib
import torch
from machine import ROOT

sys.path.insert(0, str(ROOT))
matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from common.ops import warp  # noqa: E402
from common.train.shapes import FAMILIES  # noqa: E402
from common.train.synthesis import ShapePairs  # noqa: E402

ACROSS, PANELS = 3, 5  # pairs in a row, panels of a pair


def draw(panels, pair: dict) -> None:
    middle = pair["image"].shape[-1] // 2
    moving, fixed = pair["image"][..., middle]
    warped = warp(pair["label"][None, :1], pair["disp"][None], mode="nearest")[0, 0, ..., middle]
    for panel, image in zip(panels, (moving, fixed)):
        panel.imshow(image.T, cmap="gray", vmin=0, vmax=1, origin="lower")
    for panel, label in zip(panels[2:], (pair["label"][1, ..., middle], warped)):
        panel.imshow((label * 7 % 20).T, cmap="tab20", vmin=0, vmax=19, origin="lower", interpolation="nearest")
    along = [torch.arange(n, dtype=torch.float32) for n in fixed.shape]
    lines = torch.stack(torch.meshgrid(*along, indexing="ij")) + pair["disp"][:2, ..., middle]
    panels[4].plot(*lines[:, ::3], "k", *lines[:, :, ::3].transpose(1, 2), "k", linewidth=0.4)
    panels[4].set_aspect("equal")
    title = f"{FAMILIES[pair['family']]}, {'one contrast' if pair['shared'] else 'two contrasts'}"
    panels[0].set_title(title, fontsize=7, loc="left")


def main(output: str, size: tuple = (48, 48, 48), seed: int = 0, count: int = 12) -> None:
    pairs = ShapePairs(count, size, seed)
    rows = -(-count // ACROSS)
    figure, panels = plt.subplots(rows, ACROSS * PANELS, figsize=(1.25 * ACROSS * PANELS, 1.4 * rows), squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    for n in range(count):
        first = n % ACROSS * PANELS
        draw(panels[n // ACROSS][first : first + PANELS], pairs[n])
    figure.subplots_adjust(0, 0, 1, 0.96, 0.03, 0.12)
    figure.savefig(output, dpi=90)
    lengths = [float(pairs[n]["disp"].norm(dim=0).mean()) for n in range(count)]
    print(f"{output}: {count} pairs, displacements of {min(lengths):.1f} to {max(lengths):.1f} voxels in the mean")


if __name__ == "__main__":
    fire.Fire(main)
