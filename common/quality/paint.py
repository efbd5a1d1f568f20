"""What pictures are made of: planes of a scan as small images, letters and bars on them, and the page they stand on.

Drawn by Pillow: a tenth of the time of a plotting library.
"""

from functools import cache

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion, gaussian_filter, zoom

# Okabe and Ito: told apart by everybody
ORANGE, BLUE, SKY, YELLOW, GREY = "#E69F00", "#0072B2", "#56B4E9", "#F0E442", "#999999"
LENGTHS = ("#FFFFFF", "#C6DBEF", "#6BAED6", "#2171B5", "#08306B")  # nothing to the longest displacement
PURPLES = ("#2D004B", "#8073AC", "#D8DAEB", "#F7F7F7", "#FEE0B6", "#E08214", "#7F3B08")  # halved to doubled
TILES = 8  # of the checkerboard, along the longer side
LINES = 24  # of the deformation grid, along the longer side
GAP, EDGE = 6, 26  # pixels: between panels, left of them
BAR = 96  # pixels of the colour bar with its numbers


@cache
def font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def page_of(
    rows: list[tuple[str, dict[str, Image.Image]]], caption: str = "", longest: float | None = None
) -> Image.Image:
    """The panels under their titles; with the bars of the colours if `longest` mm is the scale of the displacement."""
    titles = list(rows[0][1])
    widths = [max(panels[title].width for _, panels in rows) for title in titles]
    heights = [next(iter(panels.values())).height for _, panels in rows]
    width = EDGE + sum(widths) + len(titles) * GAP + BAR * (longest is not None)
    words = in_lines(caption, font(13), width - EDGE) if caption else []
    page = Image.new("RGB", (width, 30 + sum(heights) + len(rows) * GAP + 18 * len(words)), "white")
    draw, x = ImageDraw.Draw(page), EDGE
    for title, across in zip(titles, widths):
        draw.text((x + across / 2, 12), title, "black", font(14), anchor="mm")
        x += across + GAP
    y = 24
    for name, panels in rows:
        label = Image.new("RGB", (next(iter(panels.values())).height, EDGE), "white")
        ImageDraw.Draw(label).text((label.width / 2, EDGE / 2), name, "black", font(13), anchor="mm")
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
    for n, line in enumerate(words):
        draw.text((EDGE, y + 10 + 18 * n), line, "black", font(13), anchor="lm")
    return page


def in_lines(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    """A text in lines that fit; a word that is too long for one is cut."""
    found = [""]
    for word in text.split():
        while font.getlength(word) > width:
            word = word[: len(word) * 9 // 10]
        longer = f"{found[-1]} {word}".strip()
        found = [*found[:-1], longer] if font.getlength(longer) <= width else [*found, word]
    return found


def upright(plane: np.ndarray) -> np.ndarray:
    """(across, up) -> rows from the top."""
    return np.ascontiguousarray(plane.T[::-1])


def _size(shape: tuple[int, ...], scale: float) -> tuple[int, int]:
    return max(round(shape[0] * scale), 1), max(round(shape[1] * scale), 1)


def grey(plane: np.ndarray, top: float, scale: float, *, light: bool = False) -> Image.Image:
    level = np.clip(plane / top, 0, 1)
    values = 255 * (1 - level / 2.5 if light else level)
    image = Image.fromarray(upright(values).astype(np.uint8))
    return image.resize(_size(plane.shape, scale), Image.Resampling.NEAREST).convert("RGB")


def contours(plane: np.ndarray, top: float, scale: float, levels: int) -> Image.Image:
    """Mask of the outline of a scan, and with two levels also of its inner edges."""
    size = _size(plane.shape, scale)
    smooth = Image.fromarray(upright(gaussian_filter(plane, 0.7)).astype(np.float32))
    fine = np.asarray(smooth.resize(size, Image.Resampling.BILINEAR))
    lines = np.zeros(fine.shape, bool)
    for height in (0.1 * top, 0.55 * top)[:levels]:
        above = fine > height
        lines |= above & ~binary_erosion(above, border_value=1)
    return Image.fromarray((lines * 255).astype(np.uint8))


def checkerboard(fixed: np.ndarray, warped: np.ndarray) -> np.ndarray:
    side = max(max(fixed.shape) // TILES, 1)
    i, j = np.indices(fixed.shape) // side
    return np.where((i + j) % 2 == 0, fixed, warped)


def grid(plane: np.ndarray, disp: np.ndarray, top: float, scale: float) -> Image.Image:
    """Lines of the fixed grid, carried by the displacement within the plane, on the scan in light grey."""
    image = grey(plane, top, scale, light=True)
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


def volume_changes(determinant: np.ndarray, scale: float) -> Image.Image:
    level = np.log2(np.clip(determinant, 0.5, 2.0))  # -1 halved, 1 doubled
    colours = _palette(PURPLES)[((level + 1) / 2 * 255).round().astype(int)]
    colours[determinant <= 0] = ImageColor.getrgb(YELLOW)
    return _coloured(colours, scale)


def mask_of(voxels: np.ndarray, scale: float) -> Image.Image:
    """(across, up) booleans as what is pasted."""
    image = Image.fromarray(upright(voxels).astype(np.uint8) * 255)
    return image.resize(_size(voxels.shape, scale), Image.Resampling.NEAREST)


def lengths(level: np.ndarray, scale: float) -> Image.Image:
    return _coloured(_palette(LENGTHS)[(np.clip(level, 0, 1) * 255).round().astype(int)], scale)


def ruler(panel: Image.Image, length: float) -> None:
    """A bar of RULER mm."""
    draw, y = ImageDraw.Draw(panel), panel.height - 5
    draw.rectangle([4, y - 3, 4 + length, y], "white", "black")


def _volume_bar(height: int) -> Image.Image:
    marks = [("x 2", 0.0), ("x 1.4", 0.25), ("same", 0.5), ("x 0.7", 0.75), ("x 0.5", 1.0)]
    bar = _bar("volume", _palette(PURPLES)[::-1], height, marks, below=20)
    draw = ImageDraw.Draw(bar)
    draw.rectangle([4, bar.height - 16, 18, bar.height - 4], YELLOW)
    draw.text((24, bar.height - 10), "folds", "black", font(13), anchor="lm")
    return bar


def _length_bar(height: int, longest: float) -> Image.Image:
    marks = [(f"{longest:.1f} mm", 0.0), (f"{longest / 2:.1f} mm", 0.5), ("0 mm", 1.0)]
    return _bar("displaced by", _palette(LENGTHS)[::-1], height, marks)


def _bar(title: str, colours: np.ndarray, height: int, marks: list[tuple[str, float]], below: int = 0) -> Image.Image:
    """A bar of colours with a title, and words at places from 0, above, to 1."""
    bar = Image.new("RGB", (BAR, height + 36 + below), "white")
    draw = ImageDraw.Draw(bar)
    draw.text((4, 8), title, "black", font(13), anchor="lm")
    strip = Image.fromarray(np.ascontiguousarray(colours[:, None])).resize((14, height))
    bar.paste(strip, (4, 24))
    draw.rectangle([4, 24, 18, 24 + height], outline=GREY)
    for word, place in marks:
        draw.text((24, 24 + place * (height - 1)), word, "black", font(13), anchor="lm")
    return bar


def letters(panel: Image.Image, ends: tuple[str, ...]) -> None:
    """Left, right, bottom and top of the patient, at the edges of a panel."""
    draw, (w, h) = ImageDraw.Draw(panel), panel.size
    for letter, place in zip(ends, ((9, h / 2), (w - 9, h / 2), (w / 2, h - 9), (w / 2, 9))):
        draw.rectangle([place[0] - 7, place[1] - 7, place[0] + 7, place[1] + 7], "black")
        draw.text(place, letter, ORANGE, font(13), anchor="mm")
