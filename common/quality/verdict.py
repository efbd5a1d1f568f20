"""Whether to trust a registration, in plain words: rules on the measures and on what the network was shown.

The thresholds were chosen on one half of a set of registrations whose error is known (tests/bench/bench_verdict.py),
and measured on other people's scans in the other half:

    of 164 spoilt registrations 159 were called doubtful (97 %), of 32 good ones 2 (6 %).

Weakest is one kind: a method that does not suit the scans and left them no better than they were (10 of 13 found). What
finds it is a second, quick registration by structure alone (`common.quality.quick`). The three others are of MIND-SSC
itself, with which that one agrees; they ended 0.2 mm worse at most, or 0.06 in Dice. A method's error in mm is not
known from images. Registrations that were spoilt on purpose were measured before that rule, and are judged without it.
"""

from typing import NamedTuple

import numpy as np

from common.space.geometry import is_stripped

FOLDING_PCT = 0.5  # of the fixed foreground
ROUGH = 1.1  # SDlogJ
OVERLAP = 0.5  # Dice of the two foregrounds after the pre-alignment
UNRELATED = 0.35  # agreement of structure after the registration: that of two organs, fitted to each other, is 0.25
GAIN = 0.02  # of that agreement that counts as an improvement
ALIGNED = 0.97  # agreement that leaves nothing to improve
MIRRORED = 0.0  # how much better the moving scan agrees turned left to right, either way aligned as well as it can be
CONTRASTS = 0.1  # agreement of structure above correlation, before: then the scans are of two contrasts
DRIVEN = 0.2  # by how much the correlation of two contrasts may rise
ELSEWHERE = 0.55  # agreement with a quick registration by structure alone, which fits no worse
INVERSE_PCT = 3.0  # of the fixed foreground, with the inverse half a voxel off or more
FIRST = (  # of several reasons, the one that a page begins with: causes before effects, facts before suspicions
    "the scans are of different kinds",
    "two modalities or contrasts",
    "little overlap",
    "the scans hardly agree",
    "much folding",
    "left and right",
    "a quick registration",
)
OF_FOLDING, OF_SIDES = "much folding", "left and right"  # how sentences about it begin
OF_DEFORMATION = (OF_FOLDING, "rough deformation", "the map is not one-to-one")
LOST_PCT = 1.0  # of the labelled voxels, in labels that vanish


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


def verdict_of(sentences: object) -> str:
    """"plausible" if there is nothing to be wary of, else "doubtful": what the rules here say, and notes of the run."""
    return "doubtful" if sentences else "plausible"


def foremost(sentences: list[str]) -> str:
    """The reason that says most of several."""
    return min(sentences, key=lambda s: next((n for n, lead in enumerate(FIRST) if s.startswith(lead)), len(FIRST)))


def joined(sentences: list[str]) -> str:
    """Sentences as one cell of a table."""
    return "; ".join(sentence.replace("; ", ", ") for sentence in sentences)


def parted(cell: str) -> list[str]:
    """The sentences of such a cell."""
    return [sentence for sentence in cell.split("; ") if sentence]


def judge(row: dict[str, float]) -> list[str]:
    """Sentences about the measures of a registration that are out of the ordinary; [] where nothing is.

    They are ordered by cause: what is wrong with the scans and their alignment, with the match, with the deformation.
    """
    found, before, after = [], row["structure_before"], row["structure_after"]
    if row["overlap"] < OVERLAP:
        found.append(f"little overlap: the foregrounds share {row['overlap']:.2f} (Dice) after the pre-alignment")
    if row["structure_mirrored"] - row["structure_aligned"] > MIRRORED:
        fit = f"structure {row['structure_mirrored']:.3f} instead of {row['structure_aligned']:.3f}"
        look = f"mirrored, the moving one agrees better ({fit}); look at both headers"
        found.append(f"left and right may be exchanged in one scan: {look}")
    if before - row["ncc_before"] > CONTRASTS and row["ncc_after"] - row["ncc_before"] > DRIVEN:
        change = f"correlation {row['ncc_before']:.2f} before, {row['ncc_after']:.2f} after, no success here"
        advice = "take samconvex with --features mind, and --refine_similarity mind"
        found.append(f"two modalities or contrasts were made to look alike ({change}): structures move off; {advice}")
    if after < UNRELATED:
        advice = "one organ in both? for two contrasts use samconvex with --features mind"
        found.append(f"the scans hardly agree in structure ({after:.2f}, below {UNRELATED}): {advice}")
    elif not (after - before > GAIN or after >= ALIGNED):
        change = f"structures agree by {before:.2f} before, {after:.2f} after"
        found.append(f"no improvement over the pre-alignment: {change}")
    if goes_elsewhere(row):
        fit = f"directions agree by {row['quick_agreement']:.2f}, below {ELSEWHERE}"
        advice = "does the method suit these scans? for two contrasts use samconvex with --features mind"
        found.append(f"a quick registration by structure goes elsewhere and fits better ({fit}): {advice}")
    for name, words, sign in (("dice", "the labels overlap", 1), ("tre_mm", "the landmarks agree", -1)):
        before, after = row.get(f"{name}_before"), row.get(f"{name}_after")
        if before is not None and after is not None and sign * after < sign * before:
            unit = " mm" if name == "tre_mm" else ""
            found.append(f"{words} less than before: {before:.2f}{unit} before, {after:.2f}{unit} after")
    if row["folding_pct"] > FOLDING_PCT:
        share = f"{row['folding_pct']:.1f} % of the fixed foreground"
        found.append(f"much folding: {share} is turned inside out; try --refine_steps 50")
    if row["sdlogj"] > ROUGH:
        found.append(f"rough deformation: SDlogJ {row['sdlogj']:.1f}, above {ROUGH}")
    if row.get("labels_lost_pct", 0) > LOST_PCT:
        share = f"{row['labels_lost_pct']:.1f} % of the labelled voxels"
        found.append(f"{row['labels_lost']} of {row['labels']} labels vanish, {share}")
    words = {"inverse": "the map is not one-to-one: there and back is", "inverse_file": "the inverse is"}
    for name, text in words.items():
        if (share := row.get(f"{name}_failed_pct", 0)) > INVERSE_PCT:
            found.append(f"{text} half a voxel off or more in {share:.1f} % of the foreground")
    return found


def goes_elsewhere(row: dict[str, float]) -> bool:
    """Whether a quick registration by structure fits better and moves things otherwise; not of scans that agree."""
    apart = row.get("quick_agreement", 1) < ELSEWHERE and row["quick_gain"] > 0
    return apart and row["structure_after"] < ALIGNED


def normal(name: str, row: dict[str, float]) -> tuple[str, bool]:
    """What is normal for a measure, in words, and whether this row is out of it."""
    before, after = (row.get(f"{name}_{when}") for when in ("before", "after"))
    value = row.get(name)
    limits = {"folding_pct": FOLDING_PCT, "sdlogj": ROUGH}
    limits |= dict.fromkeys(("inverse_failed_pct", "inverse_file_failed_pct"), INVERSE_PCT)
    if name in limits:
        return f"at most {limits[name]:g}", value is not None and value > limits[name]
    if name == "structure":
        low = after is not None and before is not None and after < ALIGNED and not after - before > GAIN
        return f"rises by more than {GAIN:g}, to {UNRELATED:g} or more", low or (after or 0) < UNRELATED
    if name == "quick_agreement":
        return f"{ELSEWHERE:g} or more, where that one fits better", goes_elsewhere(row)
    if name == "overlap":
        return f"{OVERLAP:g} or more", value is not None and value < OVERLAP
    if name in ("dice", "dice_coarse", "tre_mm", "hd95", "assd"):
        sign = 1 if name.startswith("dice") else -1
        worse = before is not None and after is not None and sign * after < sign * before
        return "higher than before" if sign > 0 else "lower than before", worse
    if name in ("ncc", "nmi", "ssim"):
        return "rises, if both scans are of one contrast", False
    if name == "labels_lost":
        return f"of at most {LOST_PCT:g} % of the labelled voxels", row.get("labels_lost_pct", 0) > LOST_PCT
    return "", False


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
