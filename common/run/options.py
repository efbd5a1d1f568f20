"""The one table of options that users set: what each takes, in which range, what it does. Defaults are in the configs.

The checks (`common.run.values`), the help and `python -m common options BUNDLE` are made from it.
"""

from typing import NamedTuple


class Option(NamedTuple):
    """What an option takes.

    Attributes:
        kind: "path", "word", "whole", "number", "numbers", "switch", "range", "grid", "device" or "data".
        text: what it does.
        words: of kind "word".
        low, high: of numbers, both allowed.
        none: whether None, or the word none, may be given, which then means what the help says.
        empty: whether an empty word may be given, for none at all.
        of: the bundles that have it, if not all do.
    """

    kind: str
    text: str
    words: tuple[str, ...] = ()
    low: float = 0
    high: float = 1e6
    none: bool = False
    empty: bool = False
    of: str = ""


def _scan(role: str, what: str) -> Option:
    return Option("path", f"{what} of the {role} scan")


SHARED = {
    "dataset_dir": Option("path", "folder of a dataset.json"),
    "output_dir": Option("path", "folder for the results"),
    "quiet": Option("switch", "say nothing but what is wrong"),
    "device": Option("device", "where to compute, by default on a GPU, if there is one"),
    "threads": Option("whole", "to compute with; by default one for each idle core", low=1, high=1024, none=True),
    "amp": Option("switch", "mixed precision, on a GPU only"),
    "prealign": Option("word", "how the scans are brought together first", ("affine", "rigid", "none")),
    "spacing": Option("number", "mm of a voxel of the network's grid; 0 keeps the scan's", high=100, none=True),
    "intensity_range": Option("range", "[LOW,HIGH]: the values that become 0 and 1, for CT", none=True),
    "grid_size": Option("grid", "[I,J,K]: voxels of the network's grid, around its middle", none=True),
    "weights": Option("path", "file of the network's weights", empty=True),
    "minimum": Option("whole", "labels of at most so many voxels in the fixed map are left out", high=1e9),
    "features": Option("word", "what is compared: learned features, or MIND-SSC", ("sam", "mind"), of="samconvex"),
}
INFERENCE = {
    "moving": Option("path", 'the scan that is brought to the fixed one; contrasts as "t1.nii.gz;t2.nii.gz"'),
    "fixed": Option("path", "the scan whose space the result has"),
    "moving_label": _scan("moving", "label map"),
    "fixed_label": _scan("fixed", "label map"),
    "moving_points": _scan("moving", "landmarks"),
    "fixed_points": _scan("fixed", "landmarks"),
    "moving_mask": _scan("moving", "mask, what is looked at,"),
    "fixed_mask": _scan("fixed", "mask, what is looked at,"),
    "moving_lesion": _scan("moving", "mask of a lesion, what is left out,"),
    "fixed_lesion": _scan("fixed", "mask of a lesion, what is left out,"),
    "start": Option("path", "transform to start from, of fixed points to the moving scan, in place of the alignment"),
    "midspace": Option("switch", "register both ways, and bring both scans into the space in their middle as well"),
    "lesion_margin": Option("number", "mm by which lesions are widened", high=1000),
    "guide": Option("number", "weight with which the landmarks guide the refinement; at 0 they are measured only"),
    "holdout_points": Option("number", "share of the landmarks that do not guide, and are measured", high=1),
    "pairs": Option("path", "CSV of pairs, or a folder of scans"),
    "header": Option("word", "which header of a NIfTI file says where the scan is", ("sform", "qform"), none=True),
    "series": Option("data", "UID or description of a DICOM series, or a list for both scans", none=True),
    "passes": Option("whole", "how often the network runs", low=1, high=50),
    "refine_steps": Option("whole", "steps of instance optimisation after the network", high=10000),
    "refine_similarity": Option("word", "what those steps compare", ("lncc", "mind", "features", "auto")),
    "diffeomorphic": Option("switch", "the result is a flow, which cannot fold; steps take three times as long"),
    "memory": Option("number", "GiB that may be used; by default most of what is free", low=0.001, none=True),
    "too_large": Option("word", "what to do with a pair that needs more memory", ("stop", "tile", "coarsen")),
    "cuda_graphs": Option("switch", "on a GPU, replay what is repeated at one size as a CUDA graph"),
    "save_inverse": Option("switch", "also write the inverse transform"),
    "crop": Option("switch", "lay the network's grid around the foreground only"),
    "trained_on": Option("word", "what the weights know", ("brain_t1", "hippocampus"), none=True, empty=True),
    "save": Option("switch", "write a folder for the pair; False measures only"),
    "displacement": Option("switch", "write displacement.nii.gz; by default for small scans", none=True),
    "report": Option("word", "what is drawn: a picture, a page, both or none", ("png", "html", "both", "none")),
    "neurological": Option("switch", "draw the patient's left on the left"),
    "resume": Option("switch", "leave out pairs that are done"),
    "surface": Option("switch", "surface distances of labels, and SSIM; by default distances of few", none=True),
    "groups": Option("data", 'groups of labels for one more Dice: {"NAME": {"members": [1, 2]}}', none=True),
}
TRAINING = {
    "ckpt_dir": Option("path", "folder for the checkpoints, by default OUTPUT_DIR/models"),
    "seed": Option("whole", "of the random numbers", high=2**32 - 1),
    "reference": Option("path", "scan whose grid all are resampled to, by default the first"),
    "max_epochs": Option("whole", "how many epochs", low=1),
    "epoch_length": Option("whole", "iterations of an epoch; 0 for as many as there are pairs", high=1e9),
    "batch_size": Option("whole", "pairs in a step", low=1, high=4096),
    "learning_rate": Option("number", "of the optimiser, at the start", low=1e-12, high=100),
    "window": Option("whole", "voxels of the window of the loss's LNCC", low=3, high=99),
    "smoothness": Option("number", "weight of the smoothness in the loss"),
    "scans_device": Option("device", "where the training scans are kept, and the pairs deformed", none=True),
    "folding": Option("number", "weight of folding in the loss", of="sacb_net"),
    "cuda_graphs": Option("switch", "on a GPU, replay forward and backward pass as a CUDA graph", of="sacb_net"),
    "same_prob": Option("number", "how often a scan is registered with itself, moved", high=1, of="sacb_net"),
    "flip_prob": Option("number", "how often a pair is mirrored left to right", high=1),
    "val_interval": Option("whole", "epochs from one validation to the next", low=1),
    "val_pairs": Option("whole", "how many of the validation pairs; by default all", low=1, none=True),
    "rank": Option("whole", "number of this process", high=4096),
    "similarity": Option("word", "of the loss", ("lncc", "mse")),
    "edges": Option("number", "how much the price of smoothness falls at edges"),
    "consistency": Option("number", "weight of the inverse error of the two directions"),
    "crop": Option("whole", "voxels along each axis of a block that is trained on; -1 for the whole scan", low=-1),
    "temperature": Option("number", "of the contrastive loss", low=1e-6),
    "sizes": Option("data", "[A,B,C]: voxels along each axis of the views at each level"),
    "rotation": Option("numbers", "of the augmentation, in degrees", high=360),
    "translation": Option("number", "of the augmentation, in voxels"),
    "amplitude": Option("number", "of the augmentation, in voxels"),
    "mirror_prob": Option("numbers", "how often each axis is mirrored", high=1),
    "deformation": Option("number", "of each scan on its own, standard deviation in voxels", high=100),
    "contrast_prob": Option("number", "how often a scan gets another contrast", high=1),
    "lr_decay": Option("number", "power of the decay over the epochs; 0 for none", high=100),
    "label_codes": Option("data", "an entry a class: its code or codes", none=True),
    "ignored_codes": Option("data", "codes that count as background", none=True),
    "mirrored_classes": Option("data", "pairs of classes, left and right", none=True),
    "fine_labels": Option("switch", "compare labels code by code"),
    "labelled": Option("data", "ids of the scans whose label maps are used", none=True),
    "bad_labels": Option("word", "what to do with a faulty label map", ("error", "unlabelled")),
    "region_reduction": Option("word", "of the LNCC over the classes", ("roi", "mean", "sum")),
    **{n: Option("number", "weight in the loss") for n in ("alpha", "beta", "gamma", "eta")},
    **{f"{n}_weight": Option("number", f"weight of the {n} term in the loss") for n in ("seg", "dice", "label")},
}
OF_SERIES = {
    "reference": Option("path", "number of the phase that all are registered to, from 0, or mean; default 0"),
    "cyclic": Option("switch", "the last phase is a neighbour of the first, as in a breath or a heartbeat"),
}
OWN = {  # of some bundles
    "residual_aligner": ("similarity", "edges", "consistency", "crop", "translation", "amplitude"),
    "samconvex": ("temperature", "sizes"),
    "dual_flownet": ("alpha", "beta", "gamma", "eta", "seg_weight", "dice_weight", "label_weight", "mirror_prob")
    + ("lr_decay", "label_codes", "ignored_codes", "mirrored_classes", "fine_labels")
    + ("labelled", "bad_labels", "region_reduction"),
}
TRAINING |= {name: TRAINING[name]._replace(of=bundle) for bundle, names in OWN.items() for name in names}
TEMPLATE = {  # of `python -m common template`, beside options of a registration
    "method": Option("path", "auto looks at the first two scans and chooses; or the name or folder of a bundle"),
    "config": Option("path", "one more config of the bundle, laid over its inference.json", empty=True),
    "rounds": Option("whole", "registrations of every scan to the mean so far; 0 is the affine mean", high=50),
    "labels": Option("path", "folder of label maps with the scans' file names; fused by vote", empty=True),
    "reference": Option("path", "scan in whose pose the template lies, by default the first", empty=True),
    "voxel_size": Option("number", "mm of its voxels, by default as fine as the scans", low=0.01, high=100, none=True),
    "resume": Option("switch", "go on where a run was stopped; False begins anew"),
}
TEMPLATE_DEFAULTS = {"method": "auto", "config": "", "rounds": 4, "labels": "", "reference": "", "voxel_size": None}
TEMPLATE_DEFAULTS |= {"resume": True}
OF_ALL = ("prealign", "refine_steps", "refine_similarity", "features", "passes", "spacing", "crop", "grid_size")
OF_ALL += ("intensity_range", "weights", "trained_on", "header", "series", "lesion_margin", "device", "threads", "amp")
OF_ALL += ("memory", "too_large", "diffeomorphic")  # of INFERENCE, taken by a template for every registration
FOR_INFERENCE, FOR_TRAINING = SHARED | INFERENCE, SHARED | TRAINING
TAKES = {
    "path": "a path",
    "whole": "a whole number",
    "number": "a number",
    "numbers": "a number, or three of them",
    "switch": "True or False",
    "range": "two numbers, [low,high] with low < high",
    "grid": "three whole numbers of voxels",
    "device": "cpu or cuda:N",
    "data": "a list or a dictionary",
}


def wanted(option: Option) -> str:
    """What an option takes, in words."""
    if option.kind == "word":
        return f"one of {', '.join(option.words)}"
    if option.kind in ("whole", "number", "numbers"):
        if (option.low, option.high) == (0, 1e6):
            return f"{TAKES[option.kind]}, 0 or more"
        if option.high in (1e6, 1e9):
            return f"{TAKES[option.kind]}, {option.low:g} or more"
        return f"{TAKES[option.kind]} from {option.low:.12g} to {option.high:.12g}"
    return TAKES[option.kind]
