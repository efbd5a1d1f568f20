"""Whether to trust a registration, in plain words: rules on the measures and on what the network was shown."""

from typing import NamedTuple

import numpy as np

from common.space.geometry import is_stripped

FOLDING_PCT = 1.0  # of the fixed foreground; the shipped networks stay below 0.2 on the data they were trained on
ROUGH = 1.5  # SDlogJ
OVERLAP = 0.5  # Dice of the two foregrounds after the pre-alignment
UNRELATED = 0.2  # correlation inside the fixed foreground, after registration
GAIN = 0.002  # similarity that counts as an improvement
ALIGNED = 0.98  # correlation of a pair that leaves nothing to improve
INVERSE_PCT = 5.0  # of the fixed foreground, with the inverse half a voxel off or more: about what folding of 1 % does


class Training(NamedTuple):
    """What a network's training scans look like after scaling to [0, 1]."""

    kind: str
    stripped: bool  # background exactly 0
    median: tuple[float, float]  # of the foreground: the range over the training scans, widened by 0.1 at either end
    signed: bool = False  # values below 0 occur, as in CT


TRAINING = {
    "brain_t1": Training("skull-stripped brain T1", True, (0.53, 0.79)),
    "hippocampus": Training("MR cut out around the hippocampus", False, (0.34, 0.75)),
}


def judge(row: dict[str, float]) -> list[str]:
    """Sentences about the measures of a registration that are out of the ordinary; [] where nothing is."""
    found = []

    def worse(name: str, gain: float) -> bool:
        return not row[f"{name}_after"] - row[f"{name}_before"] > gain

    if worse("ncc", GAIN) and worse("nmi", GAIN) and not row["ncc_after"] >= ALIGNED:
        change = f"correlation {row['ncc_before']:.3f} before, {row['ncc_after']:.3f} after"
        found.append(f"no improvement over the pre-alignment: {change}")
    for name, words, sign in (("dice", "the labels overlap", 1), ("tre_mm", "the landmarks agree", -1)):
        before, after = row.get(f"{name}_before"), row.get(f"{name}_after")
        if before is not None and after is not None and sign * after < sign * before:
            unit = " mm" if name == "tre_mm" else ""
            found.append(f"{words} less than before: {before:.2f}{unit} before, {after:.2f}{unit} after")
    if row["overlap"] < OVERLAP:
        found.append(f"little overlap: the foregrounds share {row['overlap']:.2f} (Dice) after the pre-alignment")
    if row["ncc_after"] < UNRELATED:
        advice = "if they are of different modality, use --refine_similarity mind, or samconvex with --features mind"
        found.append(f"the scans hardly correlate ({row['ncc_after']:.2f}); {advice}")
    if row["folding_pct"] > FOLDING_PCT:
        found.append(f"much folding: {row['folding_pct']:.1f} % of the fixed foreground; try --refine_steps 50")
    if row["sdlogj"] > ROUGH:
        found.append(f"rough deformation: SDlogJ {row['sdlogj']:.1f}, above {ROUGH}")
    if row.get("labels_lost"):
        found.append(f"{row['labels_lost']} of {row['labels']} labels vanish")
    if row.get("inverse_failed_pct", 0) > INVERSE_PCT:
        found.append(f"the inverse is half a voxel off or more in {row['inverse_failed_pct']:.1f} % of the foreground")
    return found


def judge_scans(scans: dict[str, np.ndarray], scaled: dict[str, np.ndarray], trained_on: str | None) -> list[str]:
    """Sentences about scans that are unlike each other, or unlike what the network was trained on.

    Args:
        scans: {name: (I, J, K)} as loaded.
        scaled: {name: (i, j, k)} as the network sees them, in [0, 1].
        trained_on: a key of TRAINING; None for a method that learnt nothing.
    """
    stripped = {name: is_stripped(scan) for name, scan in scans.items()}
    signed = {name: bool(np.percentile(scan, 1) < 0) for name, scan in scans.items()}
    found = []
    if len(set(stripped.values())) > 1 or len(set(signed.values())) > 1:
        marks = [f"{name} has {_look(stripped[name], signed[name])}" for name in scans]
        found.append(f"the scans are of different kinds ({', '.join(marks)}): one modality? skull removed in both?")
    if trained_on is None:
        return found
    training = TRAINING[trained_on]
    for name, scan in scaled.items():
        low, high = training.median
        foreground = np.asarray(scan)[scan > 0]
        middle = float(np.median(foreground)) if foreground.size else 0.0
        if signed[name] and not training.signed:
            found.append(f"{name} has values below 0, as CT; the weights were trained on {training.kind}")
        elif training.stripped and not stripped[name]:
            found.append(f"{name} is not skull-stripped (its background is not 0), unlike the training data")
        elif not low <= middle <= high:
            text = f"the median of {name}'s foreground, scaled to [0, 1], is {middle:.2f}; {training.kind}"
            found.append(f"intensities unlike the training data: {text}: {low:.2f} to {high:.2f}")
    return found


def _look(stripped: bool, signed: bool) -> str:
    return (
        "values below 0, as CT"
        if signed
        else "a background of 0" if stripped else "neither negative values nor 0 around"
    )
