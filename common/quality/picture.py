"""report.png: a registration at a glance."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from common.quality import paint
from common.quality.paint import BLUE, LINES, ORANGE, SKY, YELLOW
from common.quality.report import method_of, names_of
from common.quality.views import Views

PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))
ENDS = (("L", "R", "P", "A"), ("L", "R", "I", "S"), ("P", "A", "I", "S"))  # low, high across; low, high up
NEAR = 8  # mm from a slice, within which a landmark is drawn
RULER = 20  # mm of the bar in the first column
CELL = 224  # pixels: longer side of a panel
THUMB = 88  # pixels: side of a panel for the page of a cohort
MEASURES = {  # name in a row -> words, wanted direction
    "ncc": ("correlation", "higher is better"),
    "dice": ("Dice", "higher is better"),
    "hd95": ("HD95 (mm)", "lower is better"),
    "tre_mm": ("TRE (mm)", "lower is better"),
}


def draw_report(views: Views, content: dict, path: Path, *, body: Image.Image | None = None) -> None:
    """The planes of `draw_planes` (or `body`, if they are drawn) under the verdict in large letters.

    Args:
        views: of the registration.
        content: what `common.quality.report.report` returns.
    """
    body = body or draw_planes(views)
    head = _headline(body.width, content)
    page = Image.new("RGB", (body.width, head.height + body.height), "white")
    page.paste(head, (0, 0))
    page.paste(body, (0, head.height))
    page.save(path, format="png", compress_level=1)


def caption(views: Views, *, neurological: bool = False) -> str:
    """What the planes show, on whose side, in mm."""
    side = "Neurological view: the patient's left is on the left" if neurological else (
        "Radiological view: the patient's left is on the right"
    )
    lines = f"grid lines every {max(max(views.fixed.shape) // LINES, 1) * views.mm:.0f} mm"
    found = f"{side}. Before: {views.pair.before}. Bar: {RULER} mm; {lines}. Slices and mm (RAS) of the fixed scan."
    if (views.determinant <= 0).any():
        found += " Yellow: folds."
    if views.landmarks:
        found += " Landmarks within 8 mm of the slice: fixed in a ring, moving as a dot."
    return found


def draw_planes(views: Views, *, neurological: bool = False) -> Image.Image:
    """Three planes through the fixed foreground, on the working grid (closest RAS).

    Columns: fixed scan; pre-aligned moving and warped scan with contours of the fixed one (they should follow edges),
    the warped one also with its folds in yellow;
    outlines of fixed and warped labels, and landmarks, if there are any; checkerboard of warped and fixed scan (edges
    should go on across tiles); deformed grid; Jacobian determinant on a logarithmic scale (white 1, orange growth,
    purple shrinkage, yellow folds) with the outline of the fixed scan; the displacement's length. Radiological: the
    patient's right, and the front, on the left.
    """
    scale = CELL / max(views.fixed.shape)
    rows = []
    for (plane, normal), ends in zip(PLANES, ENDS):
        panels = _panels(views, normal, scale)
        if not neurological:
            panels = {title: ImageOps.mirror(panel) for title, panel in panels.items()}
            ends = (ends[1], ends[0], *ends[2:])
        for panel in panels.values():
            paint.letters(panel, ends)
        paint.ruler(panels["fixed"], RULER / views.mm * scale)
        rows.append((f"{plane}, {_where(views, normal)}", panels))
    return paint.page_of(rows, caption(views, neurological=neurological), views.longest)


def draw_strips(views: Views) -> Image.Image:
    """Axial fixed scan, moving scan before and after with the fixed contours, folds in yellow: THUMB pixels high.

    Twice, as the page of a cohort may turn them: above radiological, below neurological.
    """
    cut = (slice(None), slice(None), views.middle[2])
    f, m, w = (scan[cut] for scan in (views.fixed, views.moving, views.warped))
    scale, strips = THUMB / max(f.shape), Image.new("RGB", (3 * THUMB, 2 * THUMB))
    edges = paint.contours(f, views.top, scale, 2)
    for n, scan in enumerate((f, m, w)):
        panel = paint.grey(scan, views.top, scale)
        if n:
            panel.paste(ORANGE, mask=edges)
        if n == 2:
            panel.paste(YELLOW, mask=paint.mask_of(views.determinant[cut] <= 0, scale))
        corner = n * THUMB + (THUMB - panel.width) // 2, (THUMB - panel.height) // 2
        strips.paste(ImageOps.mirror(panel), corner)
        strips.paste(panel, (corner[0], THUMB + corner[1]))
        for y, letters in ((0, "RL"), (THUMB, "LR")):
            for x, letter in zip((8, THUMB - 8), letters):
                ImageDraw.Draw(strips).text((n * THUMB + x, y + THUMB / 2), letter, ORANGE, paint.font(13), anchor="mm")
    return strips


def _panels(views: Views, normal: int, scale: float) -> dict[str, Image.Image]:
    """The panels of a row by their titles, the axes of the plane to the right and up."""
    cut = [slice(None)] * 3
    cut[normal] = views.middle[normal]
    scans = (views.fixed, views.moving, views.warped, views.determinant, views.pair.length)
    f, m, w, j, d = (scan[tuple(cut)] for scan in scans)
    top, within = views.top, [axis for axis in range(3) if axis != normal]
    outline, edges = paint.contours(f, top, scale, 1), paint.contours(f, top, scale, 2)
    found = {"fixed": paint.grey(f, top, scale)}
    for title, scan in (("before, fixed contours", m), ("after, fixed contours", w)):
        found[title] = paint.grey(scan, top, scale)
        found[title].paste(ORANGE, mask=edges)
    found["after, fixed contours"].paste(YELLOW, mask=paint.mask_of(j <= 0, scale))
    if views.labelled or views.landmarks:
        title = " and ".join(["labels"] * views.labelled + ["landmarks"] * bool(views.landmarks))
        found[f"{title}: fixed, warped"] = _marked(views, f, normal, scale)
    found["checkerboard"] = paint.grey(paint.checkerboard(f, w), top, scale)
    found["deformed grid"] = paint.grid(f, views.pair.disp.numpy()[within][(slice(None), *cut)], top, scale)
    coloured = (paint.volume_changes(j, scale), paint.lengths(d / views.longest, scale))
    for title, panel in zip(("volume change", "displacement"), coloured):
        panel.paste("black", mask=outline)
        found[title] = panel
    return found


def draw_volumes(volumes: dict[str, np.ndarray], affine_ras: np.ndarray, path: Path, caption: str) -> None:
    """Volumes (I, J, K) of one grid in closest RAS order, a column each, cut through its middle; grey up to their own
    99.5th percentile. Radiological, as `draw_planes`."""
    size = next(iter(volumes.values())).shape
    scale, rows = CELL / max(size), []
    tops = [max(float(np.percentile(v[v > v.min()], 99.5)) if np.ptp(v) else 1.0, 1e-6) for v in volumes.values()]
    for (plane, normal), ends in zip(PLANES, ENDS):
        cut = [slice(None)] * 3
        cut[normal] = size[normal] // 2
        cuts = zip(volumes.items(), tops)
        panels = {title: ImageOps.mirror(paint.grey(v[tuple(cut)], top, scale)) for (title, v), top in cuts}
        for panel in panels.values():
            paint.letters(panel, (ends[1], ends[0], *ends[2:]))
        mm = float(np.linalg.norm(affine_ras[:3, :3], axis=0).mean())
        paint.ruler(next(iter(panels.values())), RULER / mm * scale)
        rows.append((plane, panels))
    text = f"Radiological view: the patient's left is on the right. Bar: {RULER} mm. {caption}"
    paint.page_of(rows, text).save(path, format="png")


def _marked(views: Views, plane: np.ndarray, normal: int, scale: float) -> Image.Image:
    """Outlines of the labels of both scans, landmarks, and the way that is left from one to the other."""
    panel = paint.grey(plane, views.top, scale)
    first, size = [0, 0, 0], list(views.fixed.shape)
    first[normal], size[normal] = views.middle[normal], 1
    if views.labelled:
        for labels, colour in zip(views.labels(first, size), (SKY, ORANGE)):
            label = paint.upright(labels.squeeze(normal))
            label = np.kron(label, np.ones((4, 4), labels.dtype))  # fine enough for lines
            edge = np.zeros(label.shape, bool)
            edge[1:] |= label[1:] != label[:-1]
            edge[:, 1:] |= label[:, 1:] != label[:, :-1]
            mask = Image.fromarray((edge * 255).astype(np.uint8)).resize(panel.size, Image.Resampling.BOX)
            panel.paste(colour, mask=mask.point(lambda value: min(255, 3 * value)))
    draw, height = ImageDraw.Draw(panel), panel.height
    for mark in views.landmarks:
        if abs(mark["fixed"][normal] - views.middle[normal]) * views.mm > NEAR:
            continue
        places = {}
        for name in ("fixed", "warped"):
            a, b = (x for axis, x in enumerate(mark[name] or mark["fixed"]) if axis != normal)
            places[name] = (a + 0.5) * scale, height - (b + 0.5) * scale
        (a, b), (c, d) = places["fixed"], places["warped"]
        draw.ellipse([a - 4, b - 4, a + 4, b + 4], outline=SKY, width=2)
        draw.line([a, b, c, d], ORANGE, 2)
        draw.ellipse([c - 2, d - 2, c + 2, d + 2], fill=ORANGE)
    return panel


def _where(views: Views, normal: int) -> str:
    """Slice of the fixed scan and its place in mm."""
    pair = views.pair
    place = pair.work_affine @ [*views.middle, 1]
    voxel = np.linalg.inv(pair.fixed_affine) @ place
    axis = int(np.abs((np.linalg.inv(pair.fixed_affine) @ pair.work_affine)[:3, normal]).argmax())
    side = ("LR", "PA", "IS")[normal][int(place[normal] >= 0)]
    return f"{'ijk'[axis]} {voxel[axis]:.0f}, {side} {abs(place[normal]):.0f} mm"


def _headline(width: int, content: dict) -> Image.Image:
    """The verdict on a bar: blue with a tick, or orange with a cross and the reasons; what was made of what, how, and
    what was measured."""
    row, warnings = content["similarity"] | content["overlap"] | content["landmarks"], content["warnings"]
    parts = [
        f"{words} {row[f'{name}_before']:.3f} to {row[f'{name}_after']:.3f}"
        for name, (words, _) in MEASURES.items()
        if row.get(f"{name}_after") is not None
    ]
    parts.append(f"folding {content['deformation']['folding_pct']:.2f} %")
    colour, ink = (ORANGE, "black") if warnings else (BLUE, "white")
    moving, fixed = names_of(content)
    texts = [*(f"- {line}" for line in warnings), f"{content.get('id', '')}: moving {moving} onto fixed {fixed}"]
    texts += [method_of(content["run"]), "; ".join(parts)]
    lines = [("DOUBTFUL" if warnings else "plausible: nothing out of the ordinary", 24)]
    lines += [(line, 16) for text in texts for line in paint.in_lines(text, paint.font(16), width - 24)]
    bar = Image.new("RGB", (width, 16 + sum(size + 8 for _, size in lines)), colour)
    draw, y = ImageDraw.Draw(bar), 10
    mark = [(12, 24), (20, 32), (34, 12)] if not warnings else [(14, 12), (32, 32)]
    draw.line(mark, ink, 4)
    if warnings:
        draw.line([(32, 12), (14, 32)], ink, 4)
    for n, (text, size) in enumerate(lines):
        draw.text((44 if n == 0 else 12, y), text, ink, paint.font(size))
        y += size + 8
    return bar
