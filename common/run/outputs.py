"""The files of a pair's folder: each a function that writes one, by the file's name."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.fields import invert
from common.halves import half
from common.quality import measure, page, picture, report
from common.quality.views import Views
from common.run import progress
from common.space import io, mapping, middle, points
from common.space.transform_files import write_transform


def files_of(
    pair: measure.Registration, warped: measure.Warped, displacement: bool, *, points_like: str = ""
) -> dict[str, Callable[[Path], None]]:
    """The files of a pair's folder that need nothing but the pair; points also in the form of a file `points_like`."""
    onto = pair.fixed.shape[1:], pair.fixed_affine
    writers = {
        "warped.nii.gz": partial(io.write_scan, warped.after, pair.fixed_affine),
        "transform.h5": partial(write_transform, pair.whole),
    }
    if displacement:
        writers["displacement.nii.gz"] = partial(write_transform, pair.whole, grid=onto)
    else:
        progress.put(left_out="displacement.nii.gz, as transform.h5 says the same; --displacement True writes it")
    if warped.label_after is not None:
        writers["warped_label.nii.gz"] = partial(io.write_label, warped.label_after, pair.fixed_affine)
    if pair.moving_points is not None:
        there = mapping.invert_at(pair.whole, pair.moving_points.lps)
        if lost := int(np.isnan(there).any(1).sum()):
            progress.note(f"{lost} of {len(there)} moving points have no place in the fixed scan: the map folds there")
        form = next((form for form in (".fcsv", ".json") if points_like.lower().endswith(form)), ".csv")
        for ending in {".csv", ".mrk.json" if form == ".json" else form}:
            write = partial(points.write_points, points.Points(there, pair.moving_points.names))
            writers[f"warped_points{ending}"] = write
    return writers


def middle_files(pair: measure.Registration) -> dict[str, Callable[[Path], None]]:
    """Both scans in the space in their middle, and the transforms from there to each; of a map that is symmetric.

    The middle is H x, with H H the matrix of the alignment. There the displacement of the pair is two halves: its half
    h leads to the moving scan, h^-1 to the fixed one.
    """
    matrix = mapping.matrix_of(pair.start)
    ways = middle.ways_from_middle(matrix, np.linalg.inv(matrix))
    there, work = half(pair.disp[None]), np.linalg.inv(ways[1]) @ pair.work_affine
    scans = ((pair.moving, pair.moving_affine), (pair.fixed, pair.fixed_affine))
    size, onto = middle.middle_grid(tuple((scan.shape[1:], affine) for scan, affine in scans), ways)
    writers = {}
    for name, disp, way, (scan, affine) in zip(("moving", "fixed"), (there, invert(there)), ways, scans):
        the_map = mapping.displacement_transform(disp[0].numpy(), work)
        the_map = mapping.compose(the_map, mapping.affine_transform(way))
        options = [{"outside": io.background(channel)} for channel in scan]
        found = np.stack([mapping.resample(c, affine, size, onto, the_map, **o) for c, o in zip(scan, options)])
        writers[f"middle_{name}.nii.gz"] = partial(io.write_scan, found, onto)
        writers[f"middle_to_{name}.h5"] = partial(write_transform, the_map)
    return writers


def drawings(
    pair: measure.Registration, content: dict, kinds: tuple[str, ...], *, neurological: bool = False
) -> dict[str, Callable[[Path], None]]:
    """The files to look at; the planes are drawn once for all of them."""

    @cache
    def planes() -> tuple[Views, Image.Image]:
        progress.stage("drawing")
        views = Views(pair)
        return views, picture.draw_planes(views, neurological=neurological)

    found, sides = {}, {"neurological": neurological}
    if "png" in kinds:
        found["report.png"] = lambda path: picture.draw_report(planes()[0], content, path, body=planes()[1])
    if "html" in kinds:
        found["thumbnail.webp"] = lambda path: page.write_thumbnail(planes()[0], path)
        found["report.html"] = lambda path: page.write_page(planes()[0], content, planes()[1], path, **sides)
    return found


def write_report(content: dict, path: Path) -> None:
    """report.json, with the time of the stages that came after the verdict."""
    content["run"]["stages_cpu_s"] |= progress.take()[1]["stages_cpu_s"]
    report.write_report(content, path)


def write_classes(classes: Tensor, pair: measure.Registration, path: Path) -> None:
    """Class numbers (1, I, J, K) on the working grid, by nearest neighbour on the fixed scan's grid."""
    onto = pair.fixed.shape[1:], pair.fixed_affine
    values = mapping.resample(torch.as_tensor(classes)[0].cpu().numpy(), pair.work_affine, *onto, nearest=True)
    io.write_label(np.rint(values), pair.fixed_affine, path)
