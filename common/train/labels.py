"""Label maps as classes to learn: which codes belong to which class, and which scans may teach them."""

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import torch
from monai.data import MetaTensor
from monai.transforms import Transform

from common import InputError
from common.run.cli import sentence_of
from common.run.data import label_groups

UNKNOWN = -1  # class of a voxel that no label map describes
BAD_LABELS = ("error", "unlabelled")


class LabelTable(NamedTuple):
    """Class n, from 1, holds the codes classes[n - 1]; 0 is the background."""

    classes: list[list[int]]
    ignored: list[int]  # codes that become background
    mirrored: list[tuple[int, int]] | None  # classes that change places when left and right do; None if not known
    class_of: list[int] | None = None  # `fine`: the class of the network that class n is a part of, at n - 1


def label_table(
    classes: int,
    *,
    codes: list | None = None,
    ignored: list[int] | None = None,
    mirrored: list | None = None,
    dataset_dir: str | None = None,
    group: str = "coarse27",
    fine: bool = False,
) -> LabelTable:
    """Which codes of the label maps make the `classes` of a network.

    Args:
        classes: without background.
        codes: an entry a class, a code or a list of them. None takes the label groups of the dataset's labels.json, or
            without one the codes 1, 2, ..., `classes`.
        ignored: further codes that may occur and count as background; None takes those of labels.json that are in no
            group, if the groups are from there.
        mirrored: pairs of classes, left and right; None takes the groups of labels.json named "Right X" and "Left X",
            if the groups are from there.
        dataset_dir: folder that may have a labels.json.
        group: name of the groups there.
        fine: make each code a class of its own, in their order, and tell in `class_of` where it belongs. Left and right
            of codes are by their names in labels.json if those of all codes tell it, or else those of `mirrored`, code
            by code.

    Raises:
        InputError: another number of entries than classes, what is no code, a code in two of them, a pair that names no
            class, with `fine` a pair of classes with different numbers of codes.
    """
    groups = None if codes is not None else label_groups(dataset_dir, group)
    sides = None  # of the codes
    source = "--label_codes"
    if groups is not None:
        source = f"{dataset_dir}/labels.json"
        codes = [entry["members"] for entry in groups.values()]
        every = label_groups(dataset_dir, "full") or {}
        if ignored is None:
            ignored = [int(code) for code in every]
        if mirrored is None:
            mirrored = _sides([entry.get("name", "") for entry in groups.values()])
            sides = _sides([every.get(str(code), "") for entry in codes for code in entry])
    codes = list(range(1, classes + 1)) if codes is None else codes
    members = [list(entry) if _is_list(entry) else [entry] for entry in (codes if _is_list(codes) else [codes])]
    if strange := [code for code in [*sum(members, []), *(ignored or [])] if type(code) is not int]:
        raise InputError(f"{source}: a code of a label is a whole number, got {strange[0]!r}")
    if len(members) != classes:
        raise InputError(f"{source}: has {len(members)} classes, the network {classes}")
    known = [code for entry in members for code in entry]
    if twice := sorted({code for code in known if known.count(code) > 1 or code == 0}):
        raise InputError(f"{source}: code {twice[0]} must be in one class, and 0 is the background")
    if mirrored is not None:
        fits = _is_list(mirrored) and all(_is_list(pair) and len(pair) == 2 for pair in mirrored)
        named = [n for pair in mirrored for n in pair] if fits else []
        if not fits or len(named) != len(set(named)) or not set(named) <= set(range(1, classes + 1)):
            raise InputError(f"--mirrored_classes must be pairs of different classes up to {classes}, got {mirrored}")
        mirrored = [tuple(pair) for pair in mirrored]
    ignored = sorted(set(ignored or []) - set(known) - {0})
    if not fine:
        return LabelTable(members, ignored, mirrored)
    both_sides = {code for pair in mirrored or [] for n in pair for code in members[n - 1]}
    if mirrored is not None and (sides is None or not both_sides <= {known[n - 1] for pair in sides for n in pair}):
        sides = _code_by_code(members, mirrored)  # nobody, or not everybody, has a name that tells the side
    class_of = [number for number, entry in enumerate(members, 1) for _ in entry]
    return LabelTable([[code] for code in known], ignored, sides, class_of)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _sides(names: list[str]) -> list[tuple[int, int]]:
    """Classes (from 1) named "Right X" and "Left X"."""
    number = {name: n for n, name in enumerate(names, 1)}
    rights = [name for name in names if name.startswith("Right ") and "Left " + name[6:] in number]
    return [(number[name], number["Left " + name[6:]]) for name in rights]


def _code_by_code(members: list[list[int]], mirrored: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same pairs for classes of one code each."""
    pairs, start = [], [1]
    for entry in members:
        start.append(start[-1] + len(entry))
    for a, b in mirrored:
        one, other = len(members[a - 1]), len(members[b - 1])
        if one != other:
            fault = f"[{a}, {b}] have {one} and {other} codes, --fine_labels needs as many"
            raise InputError(f"--mirrored_classes: {fault}")
        pairs += [(start[a - 1] + n, start[b - 1] + n) for n in range(one)]
    return pairs


class ToClassesd(Transform):
    """Turn a scan's label map into classes: "label" (1, I, J, K), 0 background, n class n of the table, -1 unknown.

    A scan that is not to be learned from gets -1 everywhere, and its label map is not read.

    Args:
        table: of `label_table`.
        labelled: ids of the scans whose labels are used (few-shot), or one id; None is all of them.
        bad_labels: what to do with such a scan if it has no label map, one that cannot be read or does not fit the
            scan, one without any of the classes, or one with codes that the table does not have: "error", or use it
            "unlabelled", which is said.
        scans: all scans, to check `labelled` against.
        loading: reads a scan and its label map; None if that has been done.

    Raises:
        InputError: unknown `bad_labels`, an id in `labelled` that no scan has; see `bad_labels`.
    """

    def __init__(
        self,
        table: LabelTable,
        *,
        labelled: str | list[str] | None = None,
        bad_labels: str = "error",
        scans: list[dict] | None = None,
        loading: Callable[[dict], dict] | None = None,
    ) -> None:
        if bad_labels not in BAD_LABELS:
            raise InputError(f"--bad_labels must be one of {', '.join(BAD_LABELS)}, got {bad_labels}")
        names = labelled if _is_list(labelled) else [labelled]
        self.labelled = None if labelled is None else set(map(str, names))
        ids = {scan["id"] for scan in scans or []}
        if scans is not None and (strange := sorted((self.labelled or set()) - ids)):
            raise InputError(f"--labelled: there is no scan {strange[0]!r} to train on")
        self.bad_labels, self.loading = bad_labels, loading or dict
        largest = max([code for entry in table.classes for code in entry] + table.ignored)
        self.lookup = torch.full((largest + 1,), UNKNOWN)
        self.lookup[[0, *table.ignored]] = 0
        for number, members in enumerate(table.classes, 1):
            self.lookup[members] = number

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        without = {key: value for key, value in data.items() if key != "label"}
        classes, fault = None, None
        if self.labelled is None or str(data["id"]) in self.labelled:
            try:
                loaded = self.loading(dict(data))
                classes, fault = self._classes(loaded)
            except (InputError, RuntimeError) as error:
                if (sentence := sentence_of(error)) is None:  # Compose wraps what its transforms raise
                    raise
                loaded = self.loading(without)  # raises the same if it is the scan that is at fault
                fault = f"has a label map that cannot be used ({sentence})"
        else:
            loaded = self.loading(without)
        scan = loaded["image"]
        if fault:
            name = scan.meta["filename_or_obj"]
            if self.bad_labels == "error":
                hint = "give --bad_labels unlabelled to use it without, or name the labelled scans by --labelled"
                raise InputError(f"{name}: {fault}; {hint}")
            print(f"{name}: used without labels, it {fault}", flush=True)
        if classes is None:
            classes = torch.full((1, *scan.shape[1:]), UNKNOWN)
        return loaded | {"label": MetaTensor(classes.float(), affine=scan.affine)}

    def _classes(self, data: Mapping[Hashable, object]) -> tuple[torch.Tensor | None, str | None]:
        """Classes of a label map, or what is wrong with it."""
        if "label" not in data:
            return None, "has no label map"
        codes = data["label"].as_tensor().round().long()
        present = codes.unique()
        strange = [int(c) for c in present if not 0 <= c < len(self.lookup) or self.lookup[c] == UNKNOWN]
        if strange:
            told = ", ".join(map(str, strange[:5])) + (", ..." if len(strange) > 5 else "")
            return None, f"has label codes that the config does not know ({told})"
        if not (self.lookup[present] > 0).any():
            return None, "has a label map without any of the classes"
        return self.lookup[codes], None
