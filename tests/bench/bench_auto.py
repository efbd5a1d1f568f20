"""What `--method auto` chooses for six kinds of pairs, and what the other choices would have given.

`python tests/bench/bench_auto.py DATA`, DATA being the folder with dev; scans of a head with its skull in HEAD_FOLDER
(ch2.nii.gz and aal.nii.gz of Debian's mricron-data, CC BY) are taken as --head HEAD_FOLDER. Dice of labels; for T1 to
FLAIR, where the fixed person has none, of those that T1 to T1 of the same two people gives; for the head, of itself
bent by a known smooth field and made darker. The first row of a kind is what is chosen. The chest takes minutes a row.
--kinds "chest CT;T1 and FLAIR" measures these alone; the other rows stay as they are.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fire
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
RESULTS = ROOT / "tests" / "bench" / "results" / "auto.json"
STEPS, MIND = {"refine_steps": 50}, {"features": "mind"}
BY_MIND = {"refine_similarity": "mind"}
HIPPOCAMPUS = "hippocampus.json"
BRAINS = [("samconvex", "", STEPS), ("sacb_net", "", STEPS), ("residual_aligner", "", STEPS)]
PLAIN = [("samconvex", "", MIND), ("samconvex", "", MIND | STEPS)]


def choices(kind: str) -> list[tuple[str, str, dict]]:
    """Bundle, further config and options of the methods that the table of README.md lists for, or near, a kind."""
    small = {"spacing": 1.0} if kind in ("spine", "hippocampus") else {}
    more = {"prealign": "rigid"} if kind == "spine" else {}
    more |= {"intensity_range": [-1000, 1000]} if kind == "chest CT" else {}
    both = [(b, c, o | small | more) for b, c, o in [*PLAIN, ("samconvex", "", MIND | STEPS | BY_MIND)]]
    if kind == "hippocampus":
        return [(b, HIPPOCAMPUS, STEPS) for b in ("sacb_net", "dual_flownet", "residual_aligner")] + both[1:2]
    if kind == "brain T1":
        return [*BRAINS, ("dual_flownet", "", {"passes": 2}), both[1]]
    found = [*both, ("samconvex", "", STEPS | more)]
    if kind == "chest CT":  # all of them on 3 mm voxels, and the best two on those of 2 mm
        return [(b, c, o | {"spacing": 3.0}) for b, c, o in found] + [both[1], found[-1]]
    return found


def pairs(data: Path, head: Path | None, place: Path) -> dict[str, dict | Callable[[], dict]]:
    """Kind -> scans and label maps, or what makes them."""
    dev = data / "dev"
    t1, ms = dev / "brain_t1", dev / "brain_ms"

    def of(folder: Path, moving: str, fixed: str) -> dict:
        found = {"moving": folder / "images" / moving, "fixed": folder / "images" / fixed}
        return found | {f"{role}_label": folder / "labels" / path.name for role, path in found.items()}

    brain = of(t1, "oasis_1107.nii.gz", "oasis_1003.nii.gz")
    names = [case["image"] for case in json.loads((dev / "hippocampus_mr" / "dataset.json").read_text())["validation"]]
    hippocampus = of(dev / "hippocampus_mr", *(Path(name).name for name in names[:2]))
    spine = {"moving": dev / "spine_t1_t2/t2.nii.gz", "fixed": dev / "spine_t1_t2/t1w.nii.gz"}
    spine |= {"moving_label": dev / "spine_t1_t2/t2_seg-manual.nii.gz"}
    spine |= {"fixed_label": dev / "spine_t1_t2/t1w_seg-manual.nii.gz"}
    found = {"brain T1": brain, "hippocampus": hippocampus, "spine": spine}
    found["chest CT"] = of(dev / "chest_ct", "chest_01.nii.gz", "chest_02.nii.gz")
    found["T1 and FLAIR"] = partial(flair, brain, ms, place)
    return found | ({"head with skull": partial(bent, head, place)} if head else {})


def flair(brain: dict, ms: Path, place: Path) -> dict:
    """A T1 and another person's FLAIR, which gets the labels that the T1 of that person got."""
    from common.run.registrar import Registrar
    from common.space import io

    seen = {"moving": brain["moving"], "fixed": ms / "patient07_T1.nii.gz", "moving_label": brain["moving_label"]}
    truth = Registrar("samconvex", device="cpu", **STEPS).register(**seen)
    io.write_label(truth.warped_label, truth.affine, place / "flair_label.nii.gz")
    return seen | {"fixed": ms / "patient07_FLAIR.nii.gz", "fixed_label": place / "flair_label.nii.gz"}


def bent(head: Path, place: Path) -> dict:
    """A head and the same head, bent by a smooth field of up to 8 mm, darker by a gamma of 1.3, with noise."""
    from common.ops import warp
    from common.space import io

    scan, affine = io.read_scan(head / "ch2.nii.gz")
    label = io.read_label(head / "aal.nii.gz")[0].astype(np.float32)
    draw = torch.Generator().manual_seed(0)
    disp = torch.nn.functional.interpolate(
        torch.randn(1, 3, 7, 8, 7, generator=draw), size=scan.shape[1:], mode="trilinear", align_corners=True
    )
    disp *= 8 / disp.abs().max()
    image = warp(torch.from_numpy(scan)[None], disp)[0].numpy()
    noisy = 255 * (image / 255) ** 1.3 + 3 * torch.randn(image.shape, generator=draw).numpy()
    io.write_scan(np.where(image > 0, np.clip(noisy, 1, 255), 0).astype(np.float32), affine, place / "bent.nii.gz")
    moved = warp(torch.from_numpy(label)[None], disp, mode="nearest")[0].numpy()
    io.write_label(moved.astype(np.int32), affine, place / "bent_label.nii.gz")
    scans = {"moving": head / "ch2.nii.gz", "fixed": place / "bent.nii.gz"}
    return scans | {"moving_label": head / "aal.nii.gz", "fixed_label": place / "bent_label.nii.gz"}


def measure(data: str, head: str = "", kinds: str = "") -> None:
    from common.run.choose import choose, facts_of
    from common.run.registrar import Registrar

    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        for kind, files in pairs(Path(data), Path(head) if head else None, Path(place)).items():
            if kinds and kind not in kinds.split(";"):
                continue
            files = files() if callable(files) else files
            labels = files["moving_label"], files["fixed_label"]
            facts = facts_of(str(files["moving"]), str(files["fixed"]), labels)
            chosen = choose(facts)
            own = chosen.bundle, chosen.config, chosen.options
            rows = []
            for bundle, config, options in [own, *(one for one in choices(kind) if one != own)]:
                root = ROOT / "bundles" / bundle
                more = root / "configs" / config if config else ""
                register = Registrar(root, config=more, device="cpu", minimum=100, surface=False, **options).register
                row = register(**files).row
                words = " ".join([bundle, *filter(None, [config]), *(f"--{n} {v}" for n, v in options.items())])
                kept = {name: row[name] for name in ("dice_before", "dice_after", "folding_pct")}
                rows.append({"method": words} | kept)
                print(kind, rows[-1], flush=True)
            told = {name: round(facts.alike, 3) if name == "alike" else getattr(facts, name) for name in facts._fields}
            found[kind] = {"reason": chosen.reason, "facts": told | {"codes": len(facts.codes)}, "choices": rows}
            RESULTS.write_text(json.dumps(found, indent=2, default=str) + "\n")


if __name__ == "__main__":
    fire.Fire(measure)
