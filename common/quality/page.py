"""report.html: a registration to look through in a browser. One file, no network, no server.

The scans travel in it as pictures: a mosaic of the axial slices of a volume, which the page's script takes apart. What
is smooth, or looked at only, is packed with a loss (WebP), what has a meaning voxel by voxel without (PNG).
"""

import base64
import datetime
import io
import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import common
from common.fields import jacobian_determinant
from common.ops import warp
from common.quality import picture, verdict
from common.quality.measure import Registration
from common.space import geometry, mapping

VOXELS = 2**20  # of a volume in the page, at most: of larger grids every second voxel along each axis, or fewer
MARKS = 400  # landmarks that are drawn, at most
EVERY = 2  # voxels of the page between those at which the displacement is kept
MARKED = {  # measure: words, digits
    "ncc": ("correlation inside the fixed foreground", 3),
    "nmi": ("normalised mutual information", 3),
    "structure": ("agreement of structure (MIND-SSC, any contrast)", 3),
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


def write_page(pair: Registration, content: dict, body: Image.Image, path: Path, *, neurological: bool = False) -> None:
    """The page of a pair.

    Args:
        pair: the registration.
        content: what `common.quality.report.report` returns.
        body: what `common.quality.picture.draw_planes` returns: the first view, and what is printed.
        neurological: the patient's left on the left, at first.
    """
    step = next(n for n in range(1, 1000) if math.prod(-(-m // n) for m in pair.disp.shape[1:]) <= VOXELS)
    size, onto = page_grid(pair, step)
    lengths = geometry.length_mm(pair.disp.numpy(), pair.work_affine)
    furthest = max(float(pair.disp.abs().max()) / step, 1e-3)
    landmarks = _landmarks(pair, onto)
    to_voxel = np.linalg.inv(pair.fixed_affine) @ onto
    mm = float(np.linalg.norm(onto[:3, :3], axis=0).mean())
    data = {
        "size": size,
        "middle": [n // step for n in picture.middle_of(pair)],
        "mm": mm,
        "to_mm": onto.tolist(),
        "to_voxel": to_voxel.tolist(),
        "axes": axes_of(to_voxel),
        "fixed_size": pair.fixed.shape[1:],
        "every": EVERY,
        "furthest": furthest,
        "longest": float(np.percentile(lengths[pair.inside.numpy()], 99)) or 1.0,
        "spacing_of_grid": max(max(size) // picture.LINES, 1),
        "radiological": not neurological,
        "purples": picture.PURPLES,
        "lengths": picture.LENGTHS,
        "landmarks": landmarks,
        "volumes": _volumes(pair, step, size, onto, furthest),
    }
    run = content["run"]
    values = {
        "doubtful": content["verdict"] != "plausible",
        "reasons": content["warnings"],
        "name": content.get("id", ""),
        "fixed": Path(content["fixed"]).name,
        "moving": Path(content["moving"]).name,
        "method": method_of(run),
        "date": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        "picture": encoded(body, "WEBP", quality=82, method=1),
        "before": pair.before,
        "caption": picture.caption(pair, neurological=neurological),
        "measures": list(measures_of(content)),
        "marks": content["landmarks"].get("each"),
        "each": content["overlap"].get("each"),
        "labelled": "fixed_label" in data["volumes"],
        "landmarks": bool(landmarks),
        "step": step,
        "views": 7,
        "run": json.dumps({name: run[name] for name in run if name != "stages_cpu_s"}, indent=2, default=str),
        "maker": f"monai-registration-bundles {common.__version__}",
        "data": data,
    }
    path.write_text(render("case", values), encoding="utf-8")


def write_thumbnail(body: Image.Image, path: Path) -> None:
    """Fixed, before and after of the first row of the planes, 88 pixels high, for the page of a cohort."""
    columns = [(picture.EDGE + n * (picture.CELL + picture.GAP), 24) for n in range(3)]
    strip = Image.new("RGB", (264, 88))
    for n, (x, y) in enumerate(columns):
        panel = body.crop((x, y, x + picture.CELL, y + picture.CELL))
        strip.paste(panel.resize((88, 88), Image.Resampling.BOX), (88 * n, 0))
    strip.save(path, "WEBP", quality=75, method=0)


def render(name: str, values: Mapping[str, object]) -> str:
    """A template of this folder with its script and the style of all; what is put in is escaped."""
    style, script = (_folder().joinpath(file).read_text(encoding="utf-8") for file in ("style.css", f"{name}.js"))
    return _template(name).render(values | {"style": _safe(style), "script": _safe(script)})


def _folder() -> Path:
    return Path(__file__).parent / "pages"


@cache
def _template(name: str):
    from jinja2 import Environment, FileSystemLoader  # takes a tenth of a second to load

    templates = Environment(loader=FileSystemLoader(_folder()), autoescape=True, trim_blocks=True)
    return templates.get_template(f"{name}.html")


def _safe(text: str) -> str:
    from markupsafe import Markup

    return Markup(text)  # our own files


def encoded(image: Image.Image, kind: str, **options: object) -> str:
    """A picture as the address of itself."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def page_grid(pair: Registration, step: int) -> tuple[tuple[int, int, int], np.ndarray]:
    """Every `step`th voxel of the working grid: its size and affine."""
    return tuple(-(-n // step) for n in pair.disp.shape[1:]), pair.work_affine @ np.diag([step, step, step, 1.0])


def axes_of(to_voxel: np.ndarray) -> list[int]:
    """For each axis of a grid, the axis of the fixed scan that runs along it most."""
    return [int(n) for n in np.abs(to_voxel[:3, :3]).argmax(0)]


def _volumes(pair: Registration, step: int, size: tuple[int, ...], onto: np.ndarray, furthest: float) -> dict:
    some = (slice(None, None, step),) * 3
    moving, fixed = (half[:1] for half in pair.work.float().chunk(2))
    scans = {"fixed": fixed, "before": moving, "after": warp(moving[None], pair.disp[None])[0]}
    top = max(float(fixed.max()), 1e-6)
    found = {}
    for name, scan in scans.items():
        grey = (scan[0][some] / top).clamp(0, 1).mul(255).byte().numpy()
        found[name] = _mosaic(grey[None], "WEBP", quality=78, method=0)
    level = jacobian_determinant(pair.disp[None])[0, 0][some]  # 1 halved, 128 unchanged, 255 doubled, 0 folded
    change = (level.clamp(0.5, 2).log2() * 127 + 128).round().byte()
    found["jacobian"] = _mosaic(torch.where(level > 0, change, 0).byte().numpy()[None], "PNG", compress_level=1)
    coarse = (pair.disp / step)[(slice(None), *(slice(None, None, step * EVERY),) * 3)]
    moves = ((coarse / furthest + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    found["disp"] = _mosaic(moves, "PNG", compress_level=1)
    if pair.fixed_label is not None and pair.moving_label is not None:
        maps = (
            mapping.resample(pair.fixed_label, pair.fixed_affine, size, onto, nearest=True),
            mapping.resample(pair.moving_label, pair.moving_affine, size, onto, pair.whole, nearest=True),
        )
        for name, label in zip(("fixed_label", "warped_label"), maps):
            code = label.round().astype(np.int64) % 256  # outlines only: two neighbours of one remainder are rare
            found[name] = _mosaic(code.astype(np.uint8)[None], "PNG", compress_level=1)
    return found


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


def _landmarks(pair: Registration, onto: np.ndarray) -> list[dict]:
    """Places in voxels of the page: of the fixed landmarks, and where those of the moving scan come to lie."""
    if pair.fixed_points is None or pair.moving_points is None:
        return []
    flip = np.diag([-1.0, -1, 1, 1])
    to_page = np.linalg.inv(onto) @ flip
    fixed = pair.fixed_points.lps[:MARKS]
    back = mapping.invert(pair.start)  # what T(x) misses y by, taken back through the alignment: to first order
    there = pair.moving_points.lps[:MARKS], mapping.map_points(pair.whole, fixed)
    wanted, came = (mapping.map_points(back, points) for points in there)
    warped = fixed + wanted - came
    places = [(points @ to_page[:3, :3].T + to_page[:3, 3]).round(2) for points in (fixed, warped)]
    names = pair.fixed_points.names
    return [
        {"name": str(name), "fixed": a.tolist(), "warped": b.tolist() if np.isfinite(b).all() else None}
        for name, a, b in zip(names, *places)
    ]


def method_of(run: dict) -> str:
    """The network and its weights in words, as far as a report's run says."""
    networks = [item for item in run.get("settings") or [] if isinstance(item, dict) and "network" in item]
    if not networks:
        return f"transform {Path(run['transform']).name}" if "transform" in run else ""
    network = networks[0]
    weights = f"weights {Path(network['file']).name} {network['sha256'][:8]}" if network.get("file") else "no weights"
    return f"{network['network']}, {weights}, version {common.__version__}"


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
