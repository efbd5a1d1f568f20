"""The scans of a folder or a dataset.json to train and to validate on, and their ordered pairs."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common import InputError
from common.run.data import absolute, held_out, is_scan, read_dataset, stem
from common.run.example import write_phantom
from common.run.progress import counted

BESIDE = tuple(f"{mark}{word}" for mark in "_-." for word in ("label", "labels", "seg", "segmentation", "mask"))


def validation_pairs(dataset_dir: str | None, *, limit: int | None = None) -> list[tuple[str, str]] | None:
    """(moving id, fixed id) of the inter-subject `registration_pairs` of the validation part; None without any."""
    if not dataset_dir or not (Path(dataset_dir) / "dataset.json").exists():
        return None
    found = read_dataset(dataset_dir)
    known = {case["id"] for case in found["validation"]}
    pairs = [
        (pair["moving"], pair["fixed"])
        for pair in found.get("registration_pairs", [])
        if pair.get("kind", "inter-subject") == "inter-subject" and {pair["moving"], pair["fixed"]} <= known
    ]
    return pairs[:limit] or None


def training_pairs(dataset_dir: str | None) -> list[tuple[str, str]] | None:
    """(moving id, fixed id) of a dataset's `training_pairs`, as atlas to subject, or the two breaths of one person.

    Returns:
        None where the dataset names none: every scan with every other.

    Raises:
        InputError: a pair names a scan that the dataset does not have, or none is left without the validation scans.
    """
    if not dataset_dir or not (Path(dataset_dir) / "dataset.json").exists():
        return None
    found, path = read_dataset(dataset_dir), Path(dataset_dir) / "dataset.json"
    pairs = [(pair["moving"], pair["fixed"]) for pair in found.get("training_pairs", [])]
    known = {part: {case["id"] for case in found[part]} for part in ("training", "validation", "test")}
    if strange := sorted(name for pair in pairs for name in pair if not any(name in ids for ids in known.values())):
        raise InputError(f"{path}: the training pairs' scan {strange[0]!r} is not among the cases")
    left = [pair for pair in pairs if set(pair) <= known["training"]]
    if pairs and not left:
        raise InputError(f"{path}: no training pair has both its scans in the training part")
    return left or None


def list_scans(dataset_dir: str | None, part: str = "training", *, output_dir: str = ".") -> list[dict[str, str]]:
    """Scans to train on: those of dataset.json, else every scan in the folder, else (no folder given) two phantoms.

    Without a dataset.json a tenth of the scans, the last by name and at least two, is kept apart for the validation, as
    by `read_dataset`. Of fewer than four, none can be: the validation repeats the last two, which is said. Where the
    folder has a folder images, the scans are in there, and their label maps under the same names in labels.

    Args:
        part: "training" or "validation".

    Returns:
        [{"id", "image", "label" if there is one}].

    Raises:
        InputError: fewer than two scans.
    """
    if not dataset_dir:
        row = write_phantom(Path(output_dir) / "phantom_input")
        return [{"id": role, "image": row[role], "label": row[f"{role}_label"]} for role in ("moving", "fixed")]
    root = Path(dataset_dir).absolute()
    if (root / "dataset.json").exists():
        scans = [
            {"id": case["id"]} | {name: absolute(case[name], root) for name in ("image", "label") if name in case}
            for case in read_dataset(dataset_dir)[part]
        ]
    else:
        if not root.is_dir():
            raise InputError(f"{root}: no such folder")
        scans = _plain_folder(root, part)
    if len(scans) < 2:
        raise InputError(f"{root}: holds {len(scans)} scans for {part}, at least 2 are needed")
    return scans


def _plain_folder(root: Path, part: str) -> list[dict[str, str]]:
    """Scans of a folder without a dataset.json, with their labels if it has folders images and labels."""
    images = root / "images" if (root / "images").is_dir() else root
    files = sorted(path for path in images.iterdir() if is_scan(path))
    stems = {stem(path.name) for path in files}
    beside = [path for path in files if any(stem(path.name) == f"{other}{end}" for other in stems for end in BESIDE)]
    if beside and part == "training":
        what = f"{len(beside)} files, first {beside[0].name}, are left out: by their names they are label maps or masks"
        print(f"{images}: {what}; to train with labels, have folders images and labels with the same names", flush=True)
    files = [path for path in files if path not in beside]
    scans = [{"id": stem(path.name), "image": str(path)} for path in files]
    labels = {stem(path.name): str(path) for path in (root / "labels").glob("*") if is_scan(path)}
    if images != root:
        scans = [scan | ({"label": labels[scan["id"]]} if scan["id"] in labels else {}) for scan in scans]
    if len(scans) >= 4:
        kept = held_out(len(scans))
        return scans[:-kept] if part == "training" else scans[-kept:]
    if part != "training":
        print(f"{root}: too few scans to keep any apart: the validation is on scans of the training", flush=True)
    return scans if part == "training" else scans[-2:]


class OrderedPairs(Dataset):
    """All ordered pairs of a set of scans: one item is scan a as moving and scan b as fixed, a != b.

    Every scan is loaded and transformed once and kept in memory.

    Args:
        data: scans as `list_scans` gives them.
        transform: for one scan ({"id", "image", "label"}).
        pair_transform: for one pair ({"id", "moving", "fixed", "moving_label", "fixed_label"}).
        pairs: (moving id, fixed id) to use instead of all ordered pairs.
        kind: what every pair gets as "kind", where several sets are validated on.
        limit: number of pairs at most.
        device: where the scans are kept, and so where the pairs are made; None leaves them where they are.
    """

    def __init__(
        self,
        data: list[dict],
        transform: Callable | None = None,
        pair_transform: Callable | None = None,
        pairs: list[tuple[str, str]] | None = None,
        kind: str | None = None,
        limit: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.data, self.pair_transform, self.kind = data, pair_transform, kind
        self.scans = [transform(scan) if transform else scan for scan in counted(data, "load", "scan")]
        if device is not None:
            self.scans = [{key: _on(value, device) for key, value in scan.items()} for scan in self.scans]
        number = {scan["id"]: n for n, scan in enumerate(data)}
        if pairs:
            self.pairs = [(number[moving], number[fixed]) for moving, fixed in pairs]
        else:
            self.pairs = [(a, b) for a in range(len(data)) for b in range(len(data)) if a != b]
        self.pairs = self.pairs[:limit]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        moving, fixed = (self.scans[n] for n in self.pairs[index])
        pair = {"id": f"{moving['id']}_to_{fixed['id']}", "moving": moving["image"], "fixed": fixed["image"]}
        if "label" in moving and "label" in fixed:
            pair |= {"moving_label": moving["label"], "fixed_label": fixed["label"]}
        if self.kind:
            pair["kind"] = self.kind
        return self.pair_transform(pair) if self.pair_transform else pair


def _on(value: object, device: torch.device | str) -> object:
    return value.to(device) if isinstance(value, Tensor) else value
