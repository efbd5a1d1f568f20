"""report.html: a registration to look through in a browser. One file, no network, no server.

The scans travel in it as pictures: a mosaic of the axial slices of a volume, which the page's script takes apart. What
is looked at only is packed with a loss (JPEG: a tenth of WebP's time), what has a meaning voxel by voxel without (PNG).
"""

import base64
import io
import json
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

import common
from common.quality import mirror, paint, picture, report, verdict
from common.quality.measure import Registration
from common.quality.views import Views

VOXELS = 2**20  # of a volume in the page, at most: of larger grids every second voxel along each axis, or fewer
SHOWN = 2  # reasons that stand open; more of them would push the picture out of sight
EVERY = 2  # voxels of the page between those at which the displacement is kept
MARKED = {  # measure: words, digits
    "ncc": ("correlation inside the fixed foreground", 3),
    "nmi": ("normalised mutual information", 3),
    "structure": ("agreement of structure (MIND-SSC, any contrast)", 3),
    "quick_agreement": ("same way as a quick registration by structure, cosine", 2),
    "ssim": ("structural similarity", 3),
    "dice": ("mean Dice of the labels", 3),
    "dice_coarse": ("mean Dice of the label groups", 3),
    "hd95": ("mean HD95 of the labels, mm", 2),
    "assd": ("mean surface distance of the labels, mm", 2),
    "tre_mm": ("mean distance of the landmarks, mm", 2),
    "overlap": ("overlap of the foregrounds (Dice), aligned", 2),
    "folding_pct": ("folding, % of the fixed foreground", 3),
    "inverse_failed_pct": ("not one-to-one: half a voxel off or more, %", 2),
    "inverse_file_failed_pct": ("the inverse file half a voxel off or more, %", 2),
    "sdlogj": ("roughness: SD of the logarithm of the volume change", 3),
    "disp_mean_mm": ("mean displacement, mm", 2),
    "disp_max_mm": ("largest displacement, mm", 2),
    "labels_lost": ("labels that vanish", 0),
}


def write_page(views: Views, content: dict, body: Image.Image, path: Path, *, neurological: bool = False) -> None:
    """The page of a pair.

    Args:
        views: of the registration.
        content: what `common.quality.report.report` returns.
        body: what `common.quality.picture.draw_planes` returns: the first view, and what is printed.
        neurological: the patient's left on the left, at first.
    """
    step = next(n for n in range(1, 1000) if math.prod(-(-m // n) for m in views.fixed.shape) <= VOXELS)
    size, onto = page_grid(views.pair, step)
    furthest = max(float(views.pair.disp.abs().max()) / step, 1e-3)
    to_voxel = np.linalg.inv(views.pair.fixed_affine) @ onto
    run, names = content["run"], report.names_of(content)
    reasons = reasons_of(content["warnings"], content)
    headline = reasons[0] if reasons else ""
    deformed = headline.startswith(verdict.OF_DEFORMATION)  # what the headline is about is seen at once
    folds = bool(content["deformation"]["folding_pct"] > 0)
    edges, sides = not deformed, [reason for reason in reasons if reason.startswith(verdict.OF_SIDES)]
    data = {
        "size": size,
        "middle": [n // step for n in views.middle],
        "mm": views.mm * step,
        "to_mm": onto.tolist(),
        "to_voxel": to_voxel.tolist(),
        "axes": axes_of(to_voxel),
        "fixed_size": views.pair.fixed.shape[1:],
        "every": EVERY,
        "furthest": furthest,
        "longest": views.longest,
        "spacing_of_grid": max(max(size) // paint.LINES, 1),
        "radiological": not neurological,
        "view": "volume change" if deformed and not headline.startswith(verdict.OF_FOLDING) else "after",
        "edges": edges,
        "folds": folds,
        "purples": paint.PURPLES,
        "lengths": paint.LENGTHS,
        "landmarks": [_scaled(mark, step) for mark in views.landmarks],
        "volumes": _volumes(views, step, size, furthest),
    }
    reasons = [_led(reason) for reason in reasons]
    values = {
        "doubtful": content["verdict"] != "plausible",
        "headline": _led(headline)[0],
        "reasons": reasons[:SHOWN],
        "more": reasons[SHOWN:],
        "edges": edges,
        "remarks": run.get("remarks", []),
        "name": content.get("id", ""),
        "moving": names[0],
        "fixed": names[1],
        "method": report.method_of(run),
        "folds": folds,
        "mirrored": _mirrored(views, neurological) if sides else [],
        "mirrored_first": bool(sides) and headline == sides[0],
        "structure": content["similarity"],
        "picture": encoded(body, "JPEG", quality=90, subsampling=0),
        "caption": picture.caption(views, neurological=neurological),
        "before": views.pair.before,
        "measures": list(measures_of(content)),
        "marks": content["landmarks"].get("each"),
        "each": content["overlap"].get("each"),
        "labelled": views.labelled,
        "landmarks": bool(views.landmarks),
        "step": step,
        "views": 7,
        "run": json.dumps({name: run[name] for name in run if name != "stages_cpu_s"}, indent=2, default=str),
        "maker": f"monai-registration-bundles {common.__version__}",
        "data": data,
    }
    path.write_text(render("case", values), encoding="utf-8")


def write_thumbnail(views: Views, path: Path) -> None:
    """What `common.quality.picture.draw_strips` draws, for the page of a cohort."""
    picture.draw_strips(views).save(path, "WEBP", quality=75, method=0)


def render(name: str, values: Mapping[str, object]) -> str:
    """A template of this folder with its script and the style of all; what is put in is escaped."""
    style, script = (_folder().joinpath(file).read_text(encoding="utf-8") for file in ("style.css", f"{name}.js"))
    return _template(name).render(values | {"style": _safe(style), "script": _safe(script)})


def reasons_of(warnings: list[str], row: Mapping[str, object]) -> list[str]:
    """Reasons as a page tells them: the foremost first, scans without the folders of row["moving"] and row["fixed"]."""
    if not warnings:
        return []
    first = verdict.foremost(warnings)
    found = sorted(warnings, key=first.__ne__)
    for role, name in zip(("moving", "fixed"), report.names_of(row)):
        found = [reason.replace(str(row[role]), name) if name else reason for reason in found]
    return found


def _mirrored(views: Views, neurological: bool) -> list[str]:
    drawn = mirror.draw_mirrored(views, neurological=neurological)
    return [encoded(image, "JPEG", quality=90, subsampling=0) for image in drawn]


def _folder() -> Path:
    return Path(__file__).parent / "pages"


@cache
def _template(name: str):
    from jinja2 import Environment, FileSystemLoader  # takes a tenth of a second to load

    templates = Environment(loader=FileSystemLoader(_folder()), autoescape=True, trim_blocks=True)
    templates.filters["whole"] = _whole
    return templates.get_template(f"{name}.html")


def _whole(text: str) -> str:
    """Options of the command line, in which no line ends; the rest escaped."""
    from markupsafe import escape

    return _safe(re.sub(r"--\w+", r'<span class="whole">\g<0></span>', str(escape(text))))


def _safe(text: str) -> str:
    from markupsafe import Markup

    return Markup(text)  # our own files


def encoded(image: Image.Image, kind: str, **options: object) -> str:
    """A picture as the address of itself."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _led(sentence: str) -> tuple[str, str]:
    """What a sentence is about, and the rest of it."""
    head = re.split(r"(?<=.)(?=: | \()", sentence, maxsplit=1)
    return head[0], sentence[len(head[0]) :]


def page_grid(pair: Registration, step: int) -> tuple[tuple[int, int, int], np.ndarray]:
    """Every `step`th voxel of the working grid: its size and affine."""
    return tuple(-(-n // step) for n in pair.disp.shape[1:]), pair.work_affine @ np.diag([step, step, step, 1.0])


def axes_of(to_voxel: np.ndarray) -> list[int]:
    """For each axis of a grid, the axis of the fixed scan that runs along it most."""
    return [int(n) for n in np.abs(to_voxel[:3, :3]).argmax(0)]


def _volumes(views: Views, step: int, size: tuple[int, int, int], furthest: float) -> dict:
    some, found = (slice(None, None, step),) * 3, {}
    for name, scan in (("fixed", views.fixed), ("before", views.moving), ("after", views.warped)):
        grey = np.multiply(scan[some], 255 / views.top).clip(0, 255).astype(np.uint8)
        found[name] = _mosaic(grey[None], "JPEG", quality=88)
    level = views.determinant[some]  # 1 halved, 128 unchanged, 255 doubled, 0 folded
    change = (np.log2(level.clip(0.5, 2)) * 127 + 128).round().astype(np.uint8)
    found["jacobian"] = _mosaic(np.where(level > 0, change, 0).astype(np.uint8)[None], "PNG", compress_level=1)
    coarse = views.pair.disp[(slice(None), *(slice(None, None, step * EVERY),) * 3)] / step
    moves = ((coarse / furthest + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    found["disp"] = _mosaic(moves, "PNG", compress_level=1)
    if views.labelled:
        for name, label in zip(("fixed_label", "warped_label"), views.labels((0, 0, 0), size, step)):
            code = (label.round().astype(np.int64) % 256).astype(np.uint8)  # outlines only: two neighbours of one
            found[name] = _mosaic(code[None], "PNG", compress_level=1)  # remainder are rare
    return found


def _scaled(mark: dict, step: int) -> dict:
    places = {name: mark[name] and [round(x / step, 2) for x in mark[name]] for name in ("fixed", "warped")}
    return {"name": mark["name"]} | places


def _mosaic(channels: np.ndarray, kind: str, **options: object) -> dict:
    """(1 or 3, I, J, K) bytes as one picture of the K slices, J rows of I each."""
    count, i, j, k = channels.shape
    columns = max(math.ceil(math.sqrt(k * j / i)), 1)
    rows = -(-k // columns)
    tiles = np.zeros((rows * columns, j, i, count), np.uint8)
    tiles[:k] = channels.transpose(3, 2, 1, 0)
    sheet = tiles.reshape(rows, columns, j, i, count).transpose(0, 2, 1, 3, 4).reshape(rows * j, columns * i, count)
    image = Image.fromarray(np.ascontiguousarray(sheet[..., 0] if count == 1 else sheet))
    return {"src": encoded(image, kind, **options), "columns": columns, "channels": count, "size": [i, j, k]}


def measures_of(content: dict):
    """Lines of the table: words, before, after, what is normal, whether it is out of that."""
    row = {}
    for section in ("similarity", "overlap", "landmarks", "deformation"):
        row |= content[section]
    for name, (words, digits) in MARKED.items():
        before, after = row.get(f"{name}_before"), row.get(f"{name}_after", row.get(name))
        if after is None:
            continue
        normal, odd = verdict.normal(name, row)
        yield {
            "words": words,
            "before": "" if before is None else f"{before:.{digits}f}",
            "after": f"{after:.{digits}f}",
            "normal": normal,
            "odd": odd,
        }
