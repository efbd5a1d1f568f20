"""report.png: a registration at a glance. Drawn by Pillow: a tenth of the time of a plotting library."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from scipy.ndimage import binary_erosion, gaussian_filter, zoom

from common.quality.report import method_of, names_of
from common.quality.views import Views

PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))
# Okabe and Ito: told apart by everybody
ORANGE, BLUE, SKY, YELLOW, GREY = "#E69F00", "#0072B2", "#56B4E9", "#F0E442", "#999999"
ENDS = (("L", "R", "P", "A"), ("L", "R", "I", "S"), ("P", "A", "I", "S"))  # low, high across; low, high up
LENGTHS = ("#FFFFFF", "#C6DBEF", "#6BAED6", "#2171B5", "#08306B")  # nothing to the longest displacement
PURPLES = ("#2D004B", "#8073AC", "#D8DAEB", "#F7F7F7", "#FEE0B6", "#E08214", "#7F3B08")  # halved to doubled
NEAR = 8  # mm from a slice, within which a landmark is drawn
RULER = 20  # mm of the bar in the first column
TILES = 8  # of the checkerboard, along the longer side
LINES = 24  # of the deformation grid, along the longer side
CELL, GAP, EDGE = 224, 6, 26  # pixels: longer side of a panel, between panels, left of them
THUMB = 88  # pixels: side of a panel for the page of a cohort
BAR = 96  # pixels of the colour bar with its numbers
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
    if views.landmarks:
        found += " Landmarks within 8 mm of the slice: fixed in a ring, moving as a dot."
    return found


def draw_planes(views: Views, *, neurological: bool = False) -> Image.Image:
    """Three planes through the fixed foreground, on the working grid (closest RAS).

    Columns: fixed scan; pre-aligned moving and warped scan with contours of the fixed one (they should follow edges);
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
            _letters(panel, ends)
        _ruler(panels["fixed"], RULER / views.mm * scale)
        rows.append((f"{plane}, {_where(views, normal)}", panels))
    return _page(rows, caption(views, neurological=neurological), views.longest)


def draw_strips(views: Views) -> Image.Image:
    """Axial fixed scan, moving scan before and after, the latter with the fixed contours: THUMB pixels high.

    Twice, as the page of a cohort may turn them: above radiological, below neurological.
    """
    cut = (slice(None), slice(None), views.middle[2])
    f, m, w = (scan[cut] for scan in (views.fixed, views.moving, views.warped))
    scale, strips = THUMB / max(f.shape), Image.new("RGB", (3 * THUMB, 2 * THUMB))
    edges = _contours(f, views.top, scale, 2)
    for n, scan in enumerate((f, m, w)):
        panel = _grey(scan, views.top, scale)
        if n:
            panel.paste(ORANGE, mask=edges)
        corner = n * THUMB + (THUMB - panel.width) // 2, (THUMB - panel.height) // 2
        strips.paste(ImageOps.mirror(panel), corner)
        strips.paste(panel, (corner[0], THUMB + corner[1]))
        for y, letters in ((0, "RL"), (THUMB, "LR")):
            for x, letter in zip((8, THUMB - 8), letters):
                ImageDraw.Draw(strips).text((n * THUMB + x, y + THUMB / 2), letter, ORANGE, _font(13), anchor="mm")
    return strips


def _panels(views: Views, normal: int, scale: float) -> dict[str, Image.Image]:
    """The panels of a row by their titles, the axes of the plane to the right and up."""
    cut = [slice(None)] * 3
    cut[normal] = views.middle[normal]
    scans = (views.fixed, views.moving, views.warped, views.determinant, views.pair.length)
    f, m, w, j, d = (scan[tuple(cut)] for scan in scans)
    top, within = views.top, [axis for axis in range(3) if axis != normal]
    outline, edges = _contours(f, top, scale, 1), _contours(f, top, scale, 2)
    found = {"fixed": _grey(f, top, scale)}
    for title, scan in (("before, fixed contours", m), ("after, fixed contours", w)):
        found[title] = _grey(scan, top, scale)
        found[title].paste(ORANGE, mask=edges)
    if views.labelled or views.landmarks:
        title = " and ".join(["labels"] * views.labelled + ["landmarks"] * bool(views.landmarks))
        found[f"{title}: fixed, warped"] = _marked(views, f, normal, scale)
    found["checkerboard"] = _grey(_checkerboard(f, w), top, scale)
    found["deformed grid"] = _grid(f, views.pair.disp.numpy()[within][(slice(None), *cut)], top, scale)
    for title, panel in (("volume change", _jacobian(j, scale)), ("displacement", _lengths(d / views.longest, scale))):
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
        panels = {title: ImageOps.mirror(_grey(v[tuple(cut)], top, scale)) for (title, v), top in cuts}
        for panel in panels.values():
            _letters(panel, (ends[1], ends[0], *ends[2:]))
        _ruler(next(iter(panels.values())), RULER / float(np.linalg.norm(affine_ras[:3, :3], axis=0).mean()) * scale)
        rows.append((plane, panels))
    text = f"Radiological view: the patient's left is on the right. Bar: {RULER} mm. {caption}"
    _page(rows, text).save(path, format="png")


def _marked(views: Views, plane: np.ndarray, normal: int, scale: float) -> Image.Image:
    """Outlines of the labels of both scans, landmarks, and the way that is left from one to the other."""
    panel = _grey(plane, views.top, scale)
    first, size = [0, 0, 0], list(views.fixed.shape)
    first[normal], size[normal] = views.middle[normal], 1
    if views.labelled:
        for labels, colour in zip(views.labels(first, size), (SKY, ORANGE)):
            label = np.kron(_upright(labels.squeeze(normal)), np.ones((4, 4), labels.dtype))  # fine enough for lines
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


@cache
def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _page(rows: list[tuple[str, dict[str, Image.Image]]], caption: str, longest: float | None = None) -> Image.Image:
    """The panels under their titles; with the bars of the colours if `longest` mm is the scale of the displacement."""
    titles = list(rows[0][1])
    widths = [max(panels[title].width for _, panels in rows) for title in titles]
    heights = [next(iter(panels.values())).height for _, panels in rows]
    width = EDGE + sum(widths) + len(titles) * GAP + BAR * (longest is not None)
    page = Image.new("RGB", (width, 48 + sum(heights) + 3 * GAP), "white")
    draw, x = ImageDraw.Draw(page), EDGE
    for title, across in zip(titles, widths):
        draw.text((x + across / 2, 12), title, "black", _font(14), anchor="mm")
        x += across + GAP
    y = 24
    for name, panels in rows:
        label = Image.new("RGB", (next(iter(panels.values())).height, EDGE), "white")
        ImageDraw.Draw(label).text((label.width / 2, EDGE / 2), name, "black", _font(13), anchor="mm")
        page.paste(label.rotate(90, expand=True), (0, y))
        x = EDGE
        for panel, across in zip(panels.values(), widths):
            page.paste(panel, (x + (across - panel.width) // 2, y))
            x += across + GAP
        y += label.width + GAP
    if longest is not None:
        bars = _volume_bar((sum(heights)) // 2), _length_bar(sum(heights) // 4, longest)
        page.paste(bars[0], (x, 24))
        page.paste(bars[1], (x, y - bars[1].height))
    draw.text((EDGE, y + 10), _lines(caption, _font(13), width - EDGE)[0], "black", _font(13), anchor="lm")
    return page


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
    lines += [(line, 16) for text in texts for line in _lines(text, _font(16), width - 24)]
    bar = Image.new("RGB", (width, 16 + sum(size + 8 for _, size in lines)), colour)
    draw, y = ImageDraw.Draw(bar), 10
    mark = [(12, 24), (20, 32), (34, 12)] if not warnings else [(14, 12), (32, 32)]
    draw.line(mark, ink, 4)
    if warnings:
        draw.line([(32, 12), (14, 32)], ink, 4)
    for n, (text, size) in enumerate(lines):
        draw.text((44 if n == 0 else 12, y), text, ink, _font(size))
        y += size + 8
    return bar


def _lines(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    """A text in lines that fit; a word that is too long for one is cut."""
    found = [""]
    for word in text.split():
        while font.getlength(word) > width:
            word = word[: len(word) * 9 // 10]
        longer = f"{found[-1]} {word}".strip()
        found = [*found[:-1], longer] if font.getlength(longer) <= width else [*found, word]
    return found


def _upright(plane: np.ndarray) -> np.ndarray:
    """(across, up) -> rows from the top."""
    return np.ascontiguousarray(plane.T[::-1])


def _size(shape: tuple[int, ...], scale: float) -> tuple[int, int]:
    return max(round(shape[0] * scale), 1), max(round(shape[1] * scale), 1)


def _grey(plane: np.ndarray, top: float, scale: float, *, light: bool = False) -> Image.Image:
    level = np.clip(plane / top, 0, 1)
    values = 255 * (1 - level / 2.5 if light else level)
    image = Image.fromarray(_upright(values).astype(np.uint8))
    return image.resize(_size(plane.shape, scale), Image.Resampling.NEAREST).convert("RGB")


def _contours(plane: np.ndarray, top: float, scale: float, levels: int) -> Image.Image:
    """Mask of the outline of a scan, and with two levels also of its inner edges."""
    size = _size(plane.shape, scale)
    smooth = Image.fromarray(_upright(gaussian_filter(plane, 0.7)).astype(np.float32))
    fine = np.asarray(smooth.resize(size, Image.Resampling.BILINEAR))
    lines = np.zeros(fine.shape, bool)
    for height in (0.1 * top, 0.55 * top)[:levels]:
        above = fine > height
        lines |= above & ~binary_erosion(above, border_value=1)
    return Image.fromarray((lines * 255).astype(np.uint8))


def _checkerboard(fixed: np.ndarray, warped: np.ndarray) -> np.ndarray:
    side = max(max(fixed.shape) // TILES, 1)
    i, j = np.indices(fixed.shape) // side
    return np.where((i + j) % 2 == 0, fixed, warped)


def _grid(plane: np.ndarray, disp: np.ndarray, top: float, scale: float) -> Image.Image:
    """Lines of the fixed grid, carried by the displacement within the plane, on the scan in light grey."""
    image = _grey(plane, top, scale, light=True)
    wide = image.resize((2 * image.width, 2 * image.height))  # drawn at twice the size: Pillow's lines have steps
    draw = ImageDraw.Draw(wide)
    x, y = np.indices(plane.shape) + disp
    x, y = (x + 0.5) * 2 * scale, wide.height - (y + 0.5) * 2 * scale
    step = max(max(plane.shape) // LINES, 1)
    for n in range(0, plane.shape[0], step):
        draw.line(np.stack([x[n], y[n]], -1).ravel().tolist(), BLUE, 2)
    for n in range(0, plane.shape[1], step):
        draw.line(np.stack([x[:, n], y[:, n]], -1).ravel().tolist(), BLUE, 2)
    return wide.resize(image.size, Image.Resampling.BOX)


@cache
def _palette(colours: tuple[str, ...]) -> np.ndarray:
    """(256, 3) between the colours given."""
    marks = np.array([ImageColor.getrgb(colour) for colour in colours], float)
    return zoom(marks, (256 / len(marks), 1), order=1).round().astype(np.uint8)


def _coloured(colours: np.ndarray, scale: float) -> Image.Image:
    """(across, up, 3) as a picture."""
    image = Image.fromarray(np.ascontiguousarray(colours.transpose(1, 0, 2)[::-1]))
    return image.resize(_size(colours.shape, scale), Image.Resampling.NEAREST)


def _jacobian(determinant: np.ndarray, scale: float) -> Image.Image:
    level = np.log2(np.clip(determinant, 0.5, 2.0))  # -1 halved, 1 doubled
    colours = _palette(PURPLES)[((level + 1) / 2 * 255).round().astype(int)]
    colours[determinant <= 0] = ImageColor.getrgb(YELLOW)
    return _coloured(colours, scale)


def _lengths(level: np.ndarray, scale: float) -> Image.Image:
    return _coloured(_palette(LENGTHS)[(np.clip(level, 0, 1) * 255).round().astype(int)], scale)


def _ruler(panel: Image.Image, length: float) -> None:
    """A bar of RULER mm."""
    draw, y = ImageDraw.Draw(panel), panel.height - 5
    draw.rectangle([4, y - 3, 4 + length, y], "white", "black")


def _volume_bar(height: int) -> Image.Image:
    marks = [("x 2", 0.0), ("x 1.4", 0.25), ("same", 0.5), ("x 0.7", 0.75), ("x 0.5", 1.0)]
    bar = _bar("volume", _palette(PURPLES)[::-1], height, marks, below=20)
    draw = ImageDraw.Draw(bar)
    draw.rectangle([4, bar.height - 16, 18, bar.height - 4], YELLOW)
    draw.text((24, bar.height - 10), "folds", "black", _font(13), anchor="lm")
    return bar


def _length_bar(height: int, longest: float) -> Image.Image:
    marks = [(f"{longest:.1f} mm", 0.0), (f"{longest / 2:.1f} mm", 0.5), ("0 mm", 1.0)]
    return _bar("displaced by", _palette(LENGTHS)[::-1], height, marks)


def _bar(title: str, colours: np.ndarray, height: int, marks: list[tuple[str, float]], below: int = 0) -> Image.Image:
    """A bar of colours with a title, and words at places from 0, above, to 1."""
    bar = Image.new("RGB", (BAR, height + 36 + below), "white")
    draw = ImageDraw.Draw(bar)
    draw.text((4, 8), title, "black", _font(13), anchor="lm")
    strip = Image.fromarray(np.ascontiguousarray(colours[:, None])).resize((14, height))
    bar.paste(strip, (4, 24))
    draw.rectangle([4, 24, 18, 24 + height], outline=GREY)
    for word, place in marks:
        draw.text((24, 24 + place * (height - 1)), word, "black", _font(13), anchor="lm")
    return bar


def _letters(panel: Image.Image, ends: tuple[str, ...]) -> None:
    """Left, right, bottom and top of the patient, at the edges of a panel."""
    draw, (w, h) = ImageDraw.Draw(panel), panel.size
    for letter, place in zip(ends, ((9, h / 2), (w - 9, h / 2), (w / 2, h - 9), (w / 2, 9))):
        draw.rectangle([place[0] - 7, place[1] - 7, place[0] + 7, place[1] + 7], "black")
        draw.text(place, letter, ORANGE, _font(13), anchor="mm")
