"""Which pairs: two paths, a CSV, a data list, or the phantom; and the ordered pairs of a folder for training."""

import csv
import functools
import hashlib
import io
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

from common import InputError
from common.run.example import write_phantom
from common.run.options import FOR_INFERENCE
from common.space.io import contrasts_of

PAIR_COLUMNS = (
    "id",
    "fixed",
    "moving",
    "fixed_label",
    "moving_label",
    "fixed_points",
    "moving_points",
    "fixed_mask",
    "moving_mask",
    "fixed_lesion",
    "moving_lesion",
    "start",
    "guide",
    "holdout_points",
    "lesion_margin",
)
NUMBERS = ("guide", "holdout_points", "lesion_margin")  # columns that are no paths: the pair's own value of the option
BESIDE = ("label", "points", "mask", "lesion")  # what a case of a data list may have beside its image
LONGEST = 200  # bytes of an id: a file name has 255 at most
SCAN_ENDINGS = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")


def list_pairs(
    *,
    moving: str | None = None,
    fixed: str | None = None,
    moving_label: str | None = None,
    fixed_label: str | None = None,
    moving_points: str | None = None,
    fixed_points: str | None = None,
    moving_mask: str | None = None,
    fixed_mask: str | None = None,
    moving_lesion: str | None = None,
    fixed_lesion: str | None = None,
    start: str | None = None,
    pairs: str | None = None,
    dataset_dir: str | None = None,
    output_dir: str = ".",
) -> list[dict[str, str | float]]:
    """The pairs to register: of a CSV, two paths, a dataset's `registration_pairs` or the phantom, in that order.

    Args:
        moving, fixed, moving_label, ..., fixed_lesion: paths of one pair; labels, landmarks and masks are optional.
            A scan of several contrasts is a list of paths, or they are joined by ";".
        start: path of a transform that one pair starts from.
        pairs: CSV with columns fixed, moving and optionally id, fixed_label, ... ; paths relative to the CSV. With the
            options of one scan alone (an atlas) the table has only the other, or is a folder of scans.
        dataset_dir: folder with a dataset.json.
        output_dir: where the phantom's files go if nothing else is given.

    Returns:
        One dictionary a pair: id, moving, fixed and the optional columns that it has; absolute paths, ids unique, and
        of NUMBERS floats.

    Raises:
        InputError: contradictory or incomplete options, a missing file, an empty or faulty CSV.
    """
    row = {"moving": moving, "fixed": fixed, "moving_label": moving_label, "fixed_label": fixed_label}
    row |= {"moving_points": moving_points, "fixed_points": fixed_points}
    row |= {"moving_mask": moving_mask, "fixed_mask": fixed_mask}
    row |= {"moving_lesion": moving_lesion, "fixed_lesion": fixed_lesion}
    row = {name: absolute(value) for name, value in row.items() if value}
    if start and (pairs or not row):
        raise InputError(f"--start {start}: is for one pair; in a table of pairs it is a column")
    row |= {"start": absolute(start)} if start else {}
    roles = {name.partition("_")[0] for name in row}
    atlas = bool(pairs) and len(roles) == 1 and roles <= set(row)  # one scan for every pair of the table
    sources = {"--pairs": pairs, "--dataset_dir": dataset_dir, "--moving and --fixed": row and not atlas}
    if len(used := [name for name, value in sources.items() if value]) > 1:
        raise InputError(f"{pairs or dataset_dir}: give only one of {' or '.join(used)}")
    if row and not atlas and not (moving and fixed):
        raise InputError(f"{next(iter(row.values()))}: a pair needs both --moving and --fixed")
    if pairs:
        rows = read_pairs(pairs, row)
    elif row:
        rows = [row]
    elif dataset_dir:
        rows = dataset_pairs(dataset_dir)
    else:
        return [write_phantom(Path(os.path.abspath(output_dir)) / "phantom_input")]
    taken: set[str] = set()
    for row in rows:
        for name, value in row.items():
            parts = [] if name == "id" or name in NUMBERS else contrasts_of(value)
            missing = [part for part in parts if not Path(part).exists()]
            if missing and len(rows) == 1:  # in a cohort, that pair fails alone
                raise InputError(f"{missing[0]}: no such file")
    for row in sorted(rows, key=lambda row: not row.get("id")):  # what has a name keeps it
        if name := row.get("id"):
            row["id"] = unique(name, taken)
        else:
            free = functools.partial(_is_free, Path(output_dir), row)
            row["id"] = unique(f"{stem(row['moving'])}_to_{stem(row['fixed'])}", taken, free)
    return rows


def absolute(value: str | list[str], folder: Path | None = None) -> str:
    """Absolute path of a scan, or of its contrasts (a list, or joined by ";")."""
    return ";".join(os.path.abspath((folder or Path()) / part) for part in contrasts_of(_joined(value), folder))


def _joined(value: str | list[str]) -> str:
    return ";".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def is_scan(path: Path) -> bool:
    """Whether a file of a folder is a scan by its name; not one that is hidden, as macOS leaves beside every file."""
    return path.name.lower().endswith(SCAN_ENDINGS) and not path.name.startswith(".")


def stem(path: str) -> str:
    """File name, of the first contrast, without folder and imaging suffixes."""
    name = Path(contrasts_of(path)[0]).name
    for ending in sorted(SCAN_ENDINGS, key=len, reverse=True):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return Path(path).stem


def unique(name: str, taken: set[str], free: Callable[[str], bool] = lambda name: True) -> str:
    """`name`, made safe as a folder name, with a number behind it if it is taken or not `free`.

    Upper and lower case are one name, as on many disks. A name of more than LONGEST bytes ends in a hash of it.
    """
    name = unicodedata.normalize("NFC", name)
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip(".") or "pair"
    if len(safe.encode()) > LONGEST:
        digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:8]
        safe = f"{safe.encode()[: LONGEST - 9].decode(errors='ignore')}_{digest}"
    number, result = 2, safe
    while result.casefold() in taken or not free(result):
        number, result = number + 1, f"{safe}_{number}"
    taken.add(result.casefold())
    return result


def _is_free(folder: Path, row: dict[str, str], name: str) -> bool:
    """Whether no pair of other files has its results there: two people's T1.nii.gz, and one folder for the results."""
    try:
        told = json.loads((folder / name / "report.json").read_text(encoding="utf-8"))
        return all(told[role] == row[role] for role in ("fixed", "moving"))
    except (OSError, ValueError, KeyError, TypeError):  # none, or none of ours
        return True


def read_pairs(path: str, same: dict[str, str] | None = None) -> list[dict[str, str]]:
    """Rows of a pairs CSV, paths made absolute; of a folder, a row for every scan in it.

    Args:
        same: columns that every row has alike, as {"fixed": atlas, "fixed_label": its labels}; the table then has none
            of that scan. A folder needs it.

    Raises:
        InputError: missing file, missing or unknown columns, no rows, a row without fixed or moving.
    """
    same = same or {}
    role = next(iter(same), "").partition("_")[0]
    needed = [name for name in ("fixed", "moving") if name != role]
    if os.path.isdir(path):
        if not same:
            raise InputError(f"{path}: a folder of scans needs the one to register them with, --fixed or --moving")
        files = sorted(entry for entry in Path(path).absolute().iterdir() if is_scan(entry))
        rows = [same | {needed[0]: str(file)} for file in files if str(file) not in same.values()]
        if not rows:
            raise InputError(f"{path}: holds no scans")
        return rows
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a CSV in UTF-8") from error
    try:
        return _rows(path, text, same, needed, role)
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV that can be read ({error})") from error


def _rows(path: str, text: str, same: dict[str, str], needed: list[str], role: str) -> list[dict[str, str]]:
    with io.StringIO(text, newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        columns = [name.strip() for name in reader.fieldnames or []]
        if twice := [name for name in columns if columns.count(name) > 1]:
            raise InputError(f"{path}: the column {twice[0]!r} is there twice")
        reader.fieldnames = columns
        if missing := [name for name in needed if name not in columns]:
            raise InputError(
                f"{path}: a pairs CSV needs the columns {' and '.join(needed)}, {' and '.join(missing)} not found"
            )
        if unknown := [name for name in columns if name not in PAIR_COLUMNS]:
            raise InputError(f"{path}: unknown column {unknown[0]!r}, the columns are {', '.join(PAIR_COLUMNS)}")
        if role and (twice := [name for name in columns if name.partition("_")[0] == role]):
            raise InputError(f"{path}: has a column {twice[0]}, but the {role} scan is the same for all pairs")
        rows = []
        for line in reader:
            if None in line:
                raise InputError(f"{path}: line {reader.line_num} has more cells than there are columns")
            row = {name: (line[name] or "").strip() for name in columns if (line[name] or "").strip()}
            if not row:
                continue
            if any(name not in row for name in needed):
                raise InputError(f"{path}: line {reader.line_num} lacks {' or '.join(needed)}")
            folder = Path(path).absolute().parent
            line_number = f"{path}: line {reader.line_num}"
            rows.append(same | {name: _cell(name, text, folder, line_number) for name, text in row.items()})
    if not rows:
        raise InputError(f"{path}: holds no pairs")
    return rows


def _cell(name: str, text: str, folder: Path, where: str) -> str | float:
    if name in NUMBERS:
        from common.run.values import read

        try:
            return float(read(name, FOR_INFERENCE[name], text))
        except InputError as error:
            raise InputError(f"{where}, {error}") from error
    return text if name == "id" else absolute(text, folder)


def read_dataset(dataset_dir: str) -> dict:
    """dataset.json of a folder, in the form of the Medical Segmentation Decathlon plus `registration_pairs`.

    Every case of training, validation and test becomes {"id", "image", "label" if there is one}; a case without an id
    is named after its file, and an image of several contrasts is a list of files. Without a validation part, the last
    tenth of the training cases (at least 2, if 4 or more are there) is taken for it, so that nothing is trained on that
    is validated on.

    Raises:
        InputError: the folder or the file is missing, it is not JSON, or a case has no image.
    """
    path = Path(dataset_dir) / "dataset.json"
    if not path.exists():
        raise InputError(f"{path}: no such file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    except RecursionError as error:
        raise InputError(f"{path}: not a data list, its JSON is nested too deeply") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a data list, which is an object with a list named training")
    for part in ("training", "validation", "test", "registration_pairs"):
        if not isinstance(found.get(part, []), list):
            raise InputError(f"{path}: {part!r} must be a list")
    for part in ("training", "validation", "test"):
        cases = [{"image": case} if isinstance(case, str) else case for case in found.get(part, [])]
        if not all(isinstance(case, dict) and _names_files(case.get("image")) for case in cases):
            raise InputError(f"{path}: a case of {part!r} has no image")
        found[part] = [{"id": stem(_joined(case["image"]))} | case for case in cases]
    if not found["validation"] and len(found["training"]) >= 4:
        kept = held_out(len(found["training"]))
        found["training"], found["validation"] = found["training"][:-kept], found["training"][-kept:]
    return found


def _names_files(image: object) -> bool:
    """Whether a case's image is the name of a file, or of several."""
    names = image if isinstance(image, list) else [image]
    return bool(names) and all(isinstance(name, str) and name.strip(" ;") for name in names)


def held_out(count: int) -> int:
    """How many of the scans to train on are kept apart for the validation, where nothing says which."""
    return max(count // 10, 2)


def dataset_pairs(dataset_dir: str, *, kind: str | None = "inter-subject") -> list[dict[str, str]]:
    """`registration_pairs` of a dataset as rows of a pairs table.

    Args:
        kind: keep one kind, None keeps all. Where pairs say which part they belong to, those of "test" are taken, if
            there are any: the validation serves the training.
    """
    found = read_dataset(dataset_dir)
    root = Path(dataset_dir).absolute()
    cases = {case["id"]: case for part in ("training", "validation", "test") for case in found[part]}
    rows = []
    pairs = found.get("registration_pairs", [])
    tested = [pair for pair in pairs if isinstance(pair, dict) and pair.get("part") == "test"]
    for pair in tested or pairs:
        if not (isinstance(pair, dict) and all(isinstance(pair.get(role), str) for role in ("moving", "fixed"))):
            raise InputError(f"{root / 'dataset.json'}: a pair of registration_pairs needs fixed and moving, as ids")
        if kind is not None and pair.get("kind", kind) != kind:
            continue
        row = {}
        for role in ("moving", "fixed"):
            case = cases.get(pair[role])
            if case is None:
                raise InputError(
                    f"{root / 'dataset.json'}: the pair's {role} scan {pair[role]!r} is not among the cases"
                )
            row[role] = absolute(case["image"], root)
            row |= {f"{role}_{name}": str(root / case[name]) for name in BESIDE if name in case}
        rows.append(row)
    if not rows:
        raise InputError(f"{root / 'dataset.json'}: holds no registration_pairs")
    return rows


def label_groups(dataset_dir: str | None, name: str = "coarse27") -> dict | None:
    """Coarse label groups {number: {"members": [...]}} of a dataset's labels.json, or None if it has none."""
    path = Path(dataset_dir or ".") / "labels.json"
    return json.loads(path.read_text(encoding="utf-8")).get(name) if dataset_dir and path.exists() else None
