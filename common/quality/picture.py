"""report.png: a registration at a glance. Drawn by Pillow: a tenth of the time of a plotting library."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy.ndimage import binary_erosion, gaussian_filter, zoom

from common.fields import jacobian_determinant
from common.ops import warp
from common.quality.measure import Registration
from common.space.geometry import length_mm

PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))
ORANGE, BLUE, YELLOW, GREY = "#E69F00", "#0072B2", "#F0E442", "#999999"  # Okabe and Ito: told apart by everybody
ENDS = (("L", "R", "P", "A"), ("L", "R", "I", "S"), ("P", "A", "I", "S"))  # low, high across; low, high up
TITLES = ("fixed", "before, fixed contours", "after, fixed contours", "checkerboard", "deformed grid", "volume change")
TITLES += ("displacement",)
LENGTHS = ("#FFFFFF", "#C6DBEF", "#6BAED6", "#2171B5", "#08306B")  # nothing to the longest displacement
PURPLES = ("#2D004B", "#8073AC", "#D8DAEB", "#F7F7F7", "#FEE0B6", "#E08214", "#7F3B08")  # halved to doubled
RULER = 20  # mm of the bar in the first column
TILES = 8  # of the checkerboard, along the longer side
LINES = 24  # of the deformation grid, along the longer side
CELL, GAP, EDGE = 224, 6, 26  # pixels: longer side of a panel, between panels, left of them
BAR = 92  # pixels of the colour bar with its numbers
MEASURES = {  # name in a row -> words, wanted direction
    "ncc": ("correlation", "higher is better"),
    "dice": ("Dice", "higher is better"),
    "hd95": ("HD95 (mm)", "lower is better"),
    "tre_mm": ("TRE (mm)", "lower is better"),
}


def draw_report(
    pair: Registration, row: dict, warnings: list[str], path: Path, *, body: Image.Image | None = None
) -> None:
    """The planes of `draw_planes` (or `body`, if they are drawn) under the verdict in large letters."""
    body = body or draw_planes(pair)
    head = _headline(body.width, row, warnings)
    page = Image.new("RGB", (body.width, head.height + body.height), "white")
    page.paste(head, (0, 0))
    page.paste(body, (0, head.height))
    page.save(path, format="png", compress_level=1)


def middle_of(pair: Registration) -> list[int]:
    """Voxel of the working grid in the middle of the fixed foreground."""
    return [int(round(float(axis.float().mean()))) for axis in pair.inside.nonzero().T]


def caption(pair: Registration, *, neurological: bool = False) -> str:
    """What the planes show, on whose side, in mm."""
    size, mm = pair.disp.shape[1:], float(np.linalg.norm(pair.work_affine[:3, :3], axis=0).mean())
    side = "Neurological view: the patient's left is on the left" if neurological else (
        "Radiological view: the patient's left is on the right"
    )
    lines = f"grid lines every {max(max(size) // LINES, 1) * mm:.0f} mm"
    longest = f"displacement from white, 0, to dark blue, {_longest(pair):.1f} mm"
    return f"{side}. Before: {pair.before}. Bar: {RULER} mm; {lines}; {longest}. Slices and mm (RAS) of the fixed scan."


def draw_planes(pair: Registration, *, neurological: bool = False) -> Image.Image:
    """Three planes through the fixed foreground, on the working grid (closest RAS).

    Columns: fixed scan; pre-aligned moving and warped scan with contours of the fixed one (they should follow edges);
    checkerboard of warped and fixed scan (edges should go on across tiles); deformed grid; Jacobian determinant on a
    logarithmic scale (white 1, orange growth, purple shrinkage, yellow folds) with the outline of the fixed scan; the
    displacement's length. Radiological: the patient's right, and the front, on the left.
    """
    moving, fixed = (half[:1] for half in pair.work.float().chunk(2))
    warped = warp(moving[None], pair.disp[None])[0]
    determinant = jacobian_determinant(pair.disp[None])[0, 0].numpy()
    length = length_mm(pair.disp.numpy(), pair.work_affine)
    moving, fixed, warped = (scan[0].numpy() for scan in (moving, fixed, warped))
    middle, top, longest = middle_of(pair), max(float(fixed.max()), 1e-6), _longest(pair)
    scale = CELL / max(fixed.shape)
    ruler = RULER / float(np.linalg.norm(pair.work_affine[:3, :3], axis=0).mean()) * scale
    rows = []
    for (plane, normal), ends in zip(PLANES, ENDS):
        cut = [slice(None)] * 3
        cut[normal] = middle[normal]
        f, m, w, j, d = (scan[tuple(cut)] for scan in (fixed, moving, warped, determinant, length))
        u = np.delete(pair.disp.numpy()[(slice(None), *cut)], normal, axis=0)
        outline, edges = _contours(f, top, scale, 1), _contours(f, top, scale, 2)
        panels = [_grey(scan, top, scale) for scan in (f, m, w, _checkerboard(f, w))]
        panels += [_grid(f, u, top, scale), _jacobian(j, scale), _lengths(d / longest, scale)]
        for panel in panels[1:3]:
            panel.paste(ORANGE, mask=edges)
        for panel in panels[5:]:
            panel.paste("black", mask=outline)
        if not neurological:
            panels, ends = [ImageOps.mirror(panel) for panel in panels], (ends[1], ends[0], *ends[2:])
        for panel in panels:
            _letters(panel, ends)
        _ruler(panels[0], ruler)
        rows.append((f"{plane}, {_where(pair, middle, normal)}", panels))
    return _page(rows, caption(pair, neurological=neurological))


def draw_volumes(volumes: dict[str, np.ndarray], affine_ras: np.ndarray, path: Path, caption: str) -> None:
    """Volumes (I, J, K) of one grid in closest RAS order, a column each, cut through its middle; grey up to their own
    99.5th percentile. Radiological, as `draw_planes`."""
    size = next(iter(volumes.values())).shape
    scale, rows = CELL / max(size), []
    tops = [max(float(np.percentile(v[v > v.min()], 99.5)) if np.ptp(v) else 1.0, 1e-6) for v in volumes.values()]
    for (plane, normal), ends in zip(PLANES, ENDS):
        cut = [slice(None)] * 3
        cut[normal] = size[normal] // 2
        panels = [ImageOps.mirror(_grey(v[tuple(cut)], top, scale)) for v, top in zip(volumes.values(), tops)]
        for panel in panels:
            _letters(panel, (ends[1], ends[0], *ends[2:]))
        _ruler(panels[0], RULER / float(np.linalg.norm(affine_ras[:3, :3], axis=0).mean()) * scale)
        rows.append((plane, panels))
    text = f"Radiological view: the patient's left is on the right. Bar: {RULER} mm. {caption}"
    _page(rows, text, tuple(volumes), bar=False).save(path, format="png")


def _longest(pair: Registration) -> float:
    """mm: 99th percentile of the displacement's length inside."""
    return float(np.percentile(length_mm(pair.disp.numpy(), pair.work_affine)[pair.inside.numpy()], 99)) or 1.0


def _where(pair: Registration, middle: list[int], normal: int) -> str:
    """Slice of the fixed scan and its place in mm."""
    place = pair.work_affine @ [*middle, 1]
    voxel = np.linalg.inv(pair.fixed_affine) @ place
    axis = int(np.abs((np.linalg.inv(pair.fixed_affine) @ pair.work_affine)[:3, normal]).argmax())
    side = ("LR", "PA", "IS")[normal][int(place[normal] >= 0)]
    return f"{'ijk'[axis]} {voxel[axis]:.0f}, {side} {abs(place[normal]):.0f} mm"


@cache
def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _page(
    rows: list[tuple[str, list[Image.Image]]], caption: str, titles: tuple[str, ...] = TITLES, *, bar: bool = True
) -> Image.Image:
    count = len(titles)
    widths = [max(panels[n].width for _, panels in rows) for n in range(count)]
    heights = [panels[0].height for _, panels in rows]
    width = EDGE + sum(widths) + count * GAP + BAR * bar
    page = Image.new("RGB", (width, 48 + sum(heights) + 3 * GAP), "white")
    draw, x = ImageDraw.Draw(page), EDGE
    for title, across in zip(titles, widths):
        draw.text((x + across / 2, 12), title, "black", _font(14), anchor="mm")
        x += across + GAP
    y = 24
    for name, panels in rows:
        label = Image.new("RGB", (panels[0].height, EDGE), "white")
        ImageDraw.Draw(label).text((label.width / 2, EDGE / 2), name, "black", _font(13), anchor="mm")
        page.paste(label.rotate(90, expand=True), (0, y))
        x = EDGE
        for panel, across in zip(panels, widths):
            page.paste(panel, (x + (across - panel.width) // 2, y))
            x += across + GAP
        y += panels[0].height + GAP
    if bar:
        page.paste(_colour_bar(sum(heights) * 2 // 3), (x, 24 + sum(heights) // 6))
    draw.text((EDGE, y + 10), _shortened(caption, _font(13), width - EDGE), "black", _font(13), anchor="lm")
    return page


def _headline(width: int, row: dict, warnings: list[str]) -> Image.Image:
    """The verdict on a bar: blue with a tick, or orange with a cross and the reasons; and what was measured."""
    parts = [
        f"{words} {row[f'{name}_before']:.3f} to {row[f'{name}_after']:.3f}"
        for name, (words, _) in MEASURES.items()
        if row.get(f"{name}_after") is not None
    ]
    parts.append(f"folding {row['folding_pct']:.2f} %")
    colour, ink = (ORANGE, "black") if warnings else (BLUE, "white")
    words = "DOUBTFUL" if warnings else "plausible: nothing out of the ordinary"
    lines = [(words, 24), (f"{row.get('id', '')}:  {'; '.join(parts)}", 16), *((f"- {line}", 16) for line in warnings)]
    bar = Image.new("RGB", (width, 16 + sum(size + 8 for _, size in lines)), colour)
    draw, y = ImageDraw.Draw(bar), 10
    mark = [(12, 24), (20, 32), (34, 12)] if not warnings else [(14, 12), (32, 32)]
    draw.line(mark, ink, 4)
    if warnings:
        draw.line([(32, 12), (14, 32)], ink, 4)
    for n, (text, size) in enumerate(lines):
        x = 44 if n == 0 else 12
        draw.text((x, y), _shortened(text, _font(size), width - x - 12), ink, _font(size))
        y += size + 8
    return bar


def _shortened(text: str, font: ImageFont.ImageFont, width: int) -> str:
    """As much of a line as fits."""
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if font.getlength(text[:middle] + " ...") <= width else (low, middle)
    return text[:low].rstrip() + " ..."


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
def _palette() -> np.ndarray:
    """(256, 3) colours from halved (purple) over unchanged (white) to doubled (orange) volume."""
    marks = np.array([[int(colour[n : n + 2], 16) for n in (1, 3, 5)] for colour in PURPLES], float)
    return zoom(marks, (256 / len(marks), 1), order=1).round().astype(np.uint8)


def _jacobian(determinant: np.ndarray, scale: float) -> Image.Image:
    level = np.log2(np.clip(determinant, 0.5, 2.0))  # -1 halved, 1 doubled
    colours = _palette()[((level + 1) / 2 * 255).round().astype(int)]
    colours[determinant <= 0] = [int(YELLOW[n : n + 2], 16) for n in (1, 3, 5)]
    image = Image.fromarray(np.ascontiguousarray(colours.transpose(1, 0, 2)[::-1]))
    return image.resize(_size(determinant.shape, scale), Image.Resampling.NEAREST)


def _lengths(level: np.ndarray, scale: float) -> Image.Image:
    marks = np.array([[int(colour[n : n + 2], 16) for n in (1, 3, 5)] for colour in LENGTHS], float)
    at = np.clip(level, 0, 1) * (len(marks) - 1)
    colours = np.stack([np.interp(at, range(len(marks)), marks[:, c]) for c in range(3)], -1).round().astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(colours.transpose(1, 0, 2)[::-1]))
    return image.resize(_size(level.shape, scale), Image.Resampling.NEAREST)


def _ruler(panel: Image.Image, length: float) -> None:
    """A bar of RULER mm."""
    draw, y = ImageDraw.Draw(panel), panel.height - 5
    draw.rectangle([4, y - 3, 4 + length, y], "white", "black")


def _colour_bar(height: int) -> Image.Image:
    bar = Image.new("RGB", (BAR, height + 34), "white")
    strip = Image.fromarray(np.ascontiguousarray(_palette()[::-1, None])).resize((14, height))
    bar.paste(strip, (4, 8))
    draw = ImageDraw.Draw(bar)
    for word, place in (("x 2", 0.0), ("x 1.4", 0.25), ("same", 0.5), ("x 0.7", 0.75), ("x 0.5", 1.0)):
        draw.text((24, 8 + place * (height - 1)), word, "black", _font(13), anchor="lm")
    draw.rectangle([4, height + 16, 18, height + 28], YELLOW)
    draw.text((24, height + 22), "folds", "black", _font(13), anchor="lm")
    return bar


def _letters(panel: Image.Image, ends: tuple[str, ...]) -> None:
    """Left, right, bottom and top of the patient, at the edges of a panel."""
    draw, (w, h) = ImageDraw.Draw(panel), panel.size
    for letter, place in zip(ends, ((9, h / 2), (w - 9, h / 2), (w / 2, h - 9), (w / 2, 9))):
        draw.rectangle([place[0] - 7, place[1] - 7, place[0] + 7, place[1] + 7], "black")
        draw.text(place, letter, ORANGE, _font(13), anchor="mm")
