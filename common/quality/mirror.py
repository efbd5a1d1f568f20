"""Left and right side by side: the moving scan as it is and mirrored, each aligned anew to the fixed scan."""

import numpy as np
import torch
from PIL import Image, ImageOps

from common.quality import paint, picture
from common.quality.sides import sample_both_ways
from common.quality.views import Views

TITLES = ("fixed", "moving as it is", "moving mirrored")
SHOWN = picture.PLANES[:2]  # a sagittal plane has no left and right


def draw_mirrored(views: Views, *, neurological: bool = False) -> list[Image.Image]:
    """Panels as TITLES, with the contours of the fixed scan: an axial picture, and a coronal one."""
    scale, pictures = picture.CELL / max(views.fixed.shape), []
    cuts = [_cut(views, normal) for _, normal in SHOWN]
    points = torch.cat([torch.from_numpy(cut.reshape(3, -1)) for cut in cuts], 1).float()
    moving, fixed = (torch.from_numpy(np.ascontiguousarray(scan)) for scan in (views.moving, views.fixed))
    found = [values.numpy() for values in sample_both_ways(moving, fixed, views.pair.inside, points)]
    first = 0
    for (plane, normal), ends, cut in zip(SHOWN, picture.ENDS, cuts):
        size = cut.shape[1:]
        part = slice(first, first := first + size[0] * size[1])
        scans = [views.fixed[tuple(cut)], *(values[part].reshape(size) for values in found)]
        edges, panels = paint.contours(scans[0], views.top, scale, 2), {}
        for title, scan in zip(TITLES, scans):
            panels[title] = paint.grey(scan, views.top, scale)
            panels[title].paste(paint.ORANGE, mask=edges)
        if not neurological:
            panels = {title: ImageOps.mirror(panel) for title, panel in panels.items()}
            ends = (ends[1], ends[0], *ends[2:])
        for panel in panels.values():
            paint.letters(panel, ends)
        pictures.append(paint.page_of([(plane, panels)]))
    return pictures


def _cut(views: Views, normal: int) -> np.ndarray:
    """(3, across, up) voxels of the plane through the middle."""
    axes = [[views.middle[axis]] if axis == normal else range(n) for axis, n in enumerate(views.fixed.shape)]
    return np.stack(np.meshgrid(*axes, indexing="ij")).squeeze(normal + 1)
