"""The papers' data sets, from the folders as their owners distribute them, as a dataset.json for the bundles.

Nothing is copied, but what is no image (the pickles of IXI) is converted into `nifti/` in the output folder. The folder
layouts are described from their documentation; the sets themselves were not at hand when this was written.
"""

import itertools
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common import InputError
from common.space.io import output_folder, replaced, write_label, write_scan

# The 30 structures of TransMorph's Dice, in the FreeSurfer numbers that the pickles hold; one list for either side.
_SIDES = "Cerebral-White-Matter,Cerebral-Cortex,Lateral-Ventricle,Cerebellum-White-Matter,Cerebellum-Cortex,Thalamus,"
_SIDES += "Caudate,Putamen,Pallidum,Hippocampus,Amygdala,VentralDC,choroid-plexus"
_LEFT, _RIGHT = (2, 3, 4, 7, 8, 10, 11, 12, 13, 17, 18, 28, 31), (41, 42, 43, 46, 47, 49, 50, 51, 52, 53, 54, 60, 63)
IXI_LABELS = {
    **{14: "3rd-Ventricle", 15: "4th-Ventricle", 16: "Brain-Stem", 24: "CSF"},
    **{n: f"Left-{name}" for n, name in zip(_LEFT, _SIDES.split(","))},
    **{n: f"Right-{name}" for n, name in zip(_RIGHT, _SIDES.split(","))},
}
LPBA_LABELS = [*range(21, 35), *range(41, 51), *range(61, 69), *range(81, 93), 101, 102, 121, 122, *range(161, 167)]
ABDOMEN_LABELS = dict(
    enumerate(
        "spleen,right kidney,left kidney,gall bladder,esophagus,liver,stomach,aorta,inferior vena cava,"
        "portal and splenic vein,pancreas,left adrenal gland,right adrenal gland".split(","),
        1,
    )
)
IMAGES = (".nii.gz", ".nii", ".img", ".img.gz", ".hdr")
Parts = dict[str, list[dict]]


def write_datalist(name: str, folder: str, output: str | None = None) -> dict:
    """Write dataset.json for a named data set: cases of each part, registration_pairs, label names.

    Args:
        name: one of DATASETS.
        folder: as the owners distribute it, unpacked.
        output: folder for dataset.json; None: `folder` itself.

    Returns:
        What was written.

    Raises:
        InputError: unknown name, missing folder, a folder that does not look like this data set, or one for the output
            that cannot be written to.
    """
    if name not in DATASETS:
        raise InputError(f"{name}: no such data set, there are {', '.join(DATASETS)}")
    root, out = Path(folder), Path(output or folder)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    output_folder(out)
    content = DATASETS[name](root, out)
    if not any(content.get(part) for part in ("training", "validation", "test")):
        raise InputError(f"{root}: does not look like {name}: {LAYOUTS[name]} not found")
    content = {"name": name, "preset": PRESET_OF.get(name, name)} | content
    for part in ("training", "validation", "test"):
        content[part] = [
            {key: value if key == "id" else os.path.relpath(value, out) for key, value in case.items()}
            for case in content.get(part, [])
        ]
    replaced(out / "dataset.json", lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))
    return content


def _split(cases: list[dict], *counts: int) -> Parts:
    """The first, next and last cases as training, validation and test, in the order of their names."""
    ends = list(itertools.accumulate(counts))
    return {"training": cases[: ends[0]], "validation": cases[ends[0] : ends[1]], "test": cases[ends[1] :]}


def _all_pairs(parts: Parts) -> list[dict]:
    """All ordered pairs within validation and within test."""
    return [
        {"moving": a["id"], "fixed": b["id"], "part": part}
        for part in ("validation", "test")
        for a, b in itertools.permutations(parts[part], 2)
    ]


def _numbered(root: Path, pattern: str) -> dict[str, Path]:
    """Files whose path below `root` matches, by the number in the pattern's first group; .img before its .hdr."""
    found = {}
    for path in sorted(root.rglob("*"), reverse=True):
        match = re.fullmatch(pattern, path.relative_to(root).as_posix(), re.IGNORECASE)
        if match and path.name.lower().endswith(IMAGES):
            found[match[1]] = path
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def _join(images: dict[str, Path], labels: dict[str, Path], prefix: str) -> list[dict]:
    return [
        {"id": f"{prefix}{n}", "image": str(path)} | ({"label": str(labels[n])} if n in labels else {})
        for n, path in images.items()
    ]


def _lpba40(root: Path, out: Path) -> dict:
    """LONI's delineation space: S01/S01.delineation.skullstripped and .structure.label; 25, 5 and 10 as SACB-Net."""
    images = _numbered(root, r"(?:.*/)?S(\d\d)\.delineation\.skullstripped\.\w+(?:\.gz)?")
    labels = _numbered(root, r"(?:.*/)?S(\d\d)\.delineation\.structure\.label\.\w+(?:\.gz)?")
    parts = _split(_join(images, labels, "S"), 25, 5)
    return parts | {"labels": {str(n): f"LPBA40 {n}" for n in LPBA_LABELS}, "registration_pairs": _all_pairs(parts)}


def _ibsr18(root: Path, out: Path) -> dict:
    """NITRC's IBSR_01/IBSR_01_ana_strip and _seg_ana; all for testing, as in Dual-FlowNet."""
    images = _numbered(root, r"(?:.*/)?IBSR_(\d\d)_ana_strip\.nii(?:\.gz)?")
    labels = _numbered(root, r"(?:.*/)?IBSR_(\d\d)_seg_ana\.nii(?:\.gz)?")
    parts = _split(_join(images, labels, "IBSR_"), 0, 0)
    return parts | {"registration_pairs": _all_pairs(parts)}


def _klein(letter: str) -> Callable[[Path, Path], dict]:
    """Klein's 2009 evaluation: Brains/LETTER1.img (skull-stripped) and Atlases/LETTER1.img; all for testing."""

    def read(root: Path, out: Path) -> dict:
        images = _numbered(root, rf"(?:.*/)?Brains/{letter}(\d+)\.\w+(?:\.gz)?")
        labels = _numbered(root, rf"(?:.*/)?Atlases/{letter}(\d+)\.\w+(?:\.gz)?")
        parts = _split(_join(images, labels, letter), 0, 0)
        return parts | {"registration_pairs": _all_pairs(parts)}

    return read


def _learn2reg(names: dict[int, str] | None = None) -> Callable[[Path, Path], dict]:
    """The challenges' own NAME_dataset.json: cases, keypoints, masks, and which pairs are registered."""

    def read(root: Path, out: Path) -> dict:
        files = sorted(root.glob("*_dataset.json")) or sorted(root.glob("*/*_dataset.json"))
        if not files:
            return {}
        given = json.loads(files[0].read_text(encoding="utf-8"))
        base, cases = files[0].parent, {}
        for entry in given.get("training", []):
            entry = {"image": entry} if isinstance(entry, str) else entry
            case = {"id": Path(entry["image"]).name.removesuffix(".nii.gz")}
            for ours, theirs in (("image", "image"), ("label", "label"), ("mask", "mask"), ("points", "keypoints")):
                if theirs in entry and (base / entry[theirs]).exists():
                    case[ours] = str(base / entry[theirs])
            cases[case["id"]] = case
        chosen = {}
        for part, key in (("validation", "registration_val"), ("test", "registration_test")):
            chosen[part] = [
                {role: Path(pair[role]).name.removesuffix(".nii.gz") for role in ("moving", "fixed")}
                for pair in given.get(key, [])
            ]
        paired = [
            {role: Path(pair[role]).name.removesuffix(".nii.gz") for role in ("moving", "fixed")}
            for pair in given.get("training_paired_images", [])
        ]
        for pair in chosen["test"]:
            for role in ("moving", "fixed"):
                image = base / "imagesTs" / f"{pair[role]}.nii.gz"
                if image.exists():
                    cases.setdefault(pair[role], {"id": pair[role], "image": str(image)})
        parts = {}
        for part in ("test", "validation"):
            ids = dict.fromkeys(pair[role] for pair in chosen[part] for role in ("moving", "fixed"))
            parts[part] = [cases.pop(name) for name in ids if name in cases]
        known = {case["id"] for part in parts.values() for case in part}
        pairs = [
            pair | {"part": part}
            for part, some in chosen.items()
            for pair in some
            if {pair["moving"], pair["fixed"]} <= known
        ]
        labels = names or {int(n): label for n, label in given.get("labels", {}).get("0", {}).items() if n.isdigit()}
        return {
            "training": list(cases.values()),
            **parts,
            "training_pairs": paired,
            "registration_pairs": pairs,
            "labels": {str(n): label for n, label in labels.items()},
        }

    return read


class _Arrays(pickle.Unpickler):
    """Numpy arrays and nothing else: a pickle may otherwise run any code."""

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no array")


def _ixi(root: Path, out: Path) -> dict:
    """TransMorph's Train, Val, Test/subject_N.pkl and atlas.pkl, each (scan, label map); the atlas is always moving."""
    found = {
        part: sorted(root.rglob(f"{name}/subject_*.pkl"))
        for part, name in (("training", "Train"), ("validation", "Val"), ("test", "Test"))
    }
    atlas = sorted(root.rglob("atlas.pkl"))
    if not atlas or not any(found.values()):
        return {}
    first = _from_pickle(atlas[0], out)
    content: dict = {part: [_from_pickle(path, out) for path in paths] for part, paths in found.items()}
    content["registration_pairs"] = [
        {"moving": "atlas", "fixed": case["id"], "part": part}
        for part in ("validation", "test")
        for case in content[part]
    ]
    content["training_pairs"] = [{"moving": "atlas", "fixed": case["id"]} for case in content["training"]]
    content["training"] = [first, *content["training"]]
    return content | {"labels": {str(n): name for n, name in IXI_LABELS.items()}}


def _from_pickle(path: Path, out: Path) -> dict:
    """(scan, label map) as NIfTI, 1 mm, axes as stored: the pickles do not say how they lie in space.

    Of the label map the 30 structures are kept, so that a mean over its labels is the one of the papers.
    """
    try:
        with path.open("rb") as file:
            scan, label = _Arrays(file).load()
        scan, label = np.squeeze(scan).astype(np.float32), np.squeeze(label)
        if scan.ndim != 3 or scan.shape != label.shape:
            raise ValueError(f"shapes {scan.shape} and {label.shape}")
        label = np.where(np.isin(label, list(IXI_LABELS)), label, 0)
    except (pickle.UnpicklingError, ValueError, TypeError, EOFError, AttributeError) as error:
        raise InputError(f"{path}: not a pair of a scan and its label map ({error})") from error
    folder = out / "nifti"
    folder.mkdir(exist_ok=True)
    names = {"image": folder / f"{path.stem}.nii.gz", "label": folder / f"{path.stem}_label.nii.gz"}
    replaced(names["image"], lambda partial: write_scan(scan, np.eye(4), partial))
    replaced(names["label"], lambda partial: write_label(label, np.eye(4), partial))
    return {"id": path.stem} | {key: str(value) for key, value in names.items()}


DATASETS: dict[str, Callable[[Path, Path], dict]] = {
    "ixi": _ixi,
    "lpba40": _lpba40,
    "abdomen_ctct": _learn2reg(ABDOMEN_LABELS),
    "oasis": _learn2reg(),
    "lungct": _learn2reg(),
    "nlst": _learn2reg(),
    "ibsr18": _ibsr18,
    "cumc12": _klein("m"),
    "mgh10": _klein("g"),
}
PRESET_OF = {"ibsr18": "brain_affine", "cumc12": "brain_affine", "mgh10": "brain_affine"}
LAYOUTS = {
    "ixi": "atlas.pkl and Train, Val, Test/subject_N.pkl",
    "lpba40": "S01/S01.delineation.skullstripped and S01.delineation.structure.label",
    **dict.fromkeys(("abdomen_ctct", "oasis", "lungct", "nlst"), "NAME_dataset.json with imagesTr and labelsTr"),
    "ibsr18": "IBSR_01/IBSR_01_ana_strip and IBSR_01_seg_ana",
    "cumc12": "Brains/m1 and Atlases/m1",
    "mgh10": "Brains/g1 and Atlases/g1",
}
