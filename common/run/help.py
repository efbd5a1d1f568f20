"""What options a bundle has, in words: for --help, and for `python -m common options BUNDLE`."""

import json
import os
import textwrap
from pathlib import Path

from common.run.cli import bundle_folder
from common.run.options import (
    FOR_INFERENCE,
    FOR_TRAINING,
    OF_ALL,
    OF_SERIES,
    TEMPLATE,
    TEMPLATE_DEFAULTS,
    Option,
    wanted,
)

WIDTH = 110


def help_of(config_file: str, config: dict, table: dict[str, Option]) -> str:
    """Every option of a config, its default, what it takes and does.

    Args:
        config_file: the first of the files that `config` is made of.
        config: content of the files.
        table: as `common.run.words.table_of` gives it.
    """
    folder = Path(config_file).resolve().parent
    name = folder.parent.name if folder.name == "configs" else folder.name
    doing = "trains" if "train" in config else "registers"
    first = f"python -m monai.bundle run --config_file {config_file} --bundle_root {Path(config_file).parent.parent}"
    lines = [f"{first} [--OPTION VALUE ...]", "", f"{name} {doing}. Its options, and their defaults:", ""]
    for option in table:
        if option in config:
            lines += _explained(option, table[option], config[option])
    if arguments := config.get("network_def"):
        lines += ["", "Arguments of the network, as --network_def::NAME VALUE; the model card explains them:", ""]
        lines += [f"  {n}: {json.dumps(v)}" for n, v in arguments.items() if not n.startswith("_")]
    more = "More: common/run/README.md, common/train/README.md and docs/README.md of the bundle."
    return "\n".join([*lines, "", more])


def help_of_bundle(bundle: str, *, training: bool = False) -> str:
    """`help_of` a bundle's inference.json or train.json.

    Raises:
        InputError: there is no such bundle.
    """
    file = bundle_folder(bundle) / "configs" / ("train.json" if training else "inference.json")
    config = json.loads(file.read_text(encoding="utf-8"))
    return help_of(os.path.relpath(file), config, FOR_TRAINING if training else FOR_INFERENCE)


def help_of_register() -> str:
    """What the front door takes; the defaults are those of samconvex."""
    lines = ["monai-register MOVING FIXED OUT [--method METHOD] [--OPTION VALUE ...]", ""]
    lines += ["Registers two scans; `python -m common register` is the same. `monai-register bids --help` says how"]
    lines += ["those of a BIDS data set are registered.", ""]
    lines += ["  monai-register moving.nii.gz fixed.nii.gz out", "  monai-register --pairs pairs.csv out", ""]
    lines += ["out/moving_to_fixed/ gets the warped scan, the transform, and report.html with a verdict. Most used:"]
    lines += ["--moving_label and --fixed_label, --method, --refine_steps, --prealign. All options:", ""]
    own = {
        "method": "auto looks at the scans and chooses; or the name or folder of a bundle: sacb_net, samconvex, "
        "dual_flownet, residual_aligner; default auto",
        "config": "one more config of the bundle, laid over its inference.json, as hippocampus.json",
    }
    lines += [line for name, text in own.items() for line in _wrapped(name, text)]
    config = json.loads((bundle_folder("samconvex") / "configs" / "inference.json").read_text(encoding="utf-8"))
    for name, option in FOR_INFERENCE.items():
        lines += _explained(name, option, config.get(name))
    return "\n".join([*lines, "", "Where bundles differ, defaults are those of samconvex. More: common/run/README.md."])


def help_of_series() -> str:
    """What `python -m common series` takes beside the options of `register`."""
    lines = ["python -m common series SERIES OUT [--reference N|mean] [--cyclic True] [--OPTION VALUE ...]", ""]
    lines += ["Registers every phase of a 4-D NIfTI file, or of a folder with a file (or DICOM folder) a phase, to"]
    lines += ["one of them, each started from what its neighbour has found. Run again, it does what is missing."]
    lines += ["", *(line for name, option in OF_SERIES.items() for line in _explained(name, option, None)), ""]
    lines += ["--fixed_label, --fixed_points, --fixed_mask, --fixed_lesion are those of the reference. The others are"]
    lines += ["those of monai-register; --prealign none, --refine_steps 20, --report none are the defaults here."]
    return "\n".join(lines)


def help_of_template() -> str:
    """What `python -m common template` takes."""
    lines = ["python -m common template SCANS OUT [--OPTION VALUE ...]", ""]
    lines += [
        "Makes a template of mean shape and intensity of all scans in a folder, or in a CSV with the column moving.",
        "With its column moving_label, or --labels, label maps are fused. The same line again goes on.",
        "",
    ]
    lines += [line for n, option in TEMPLATE.items() for line in _explained(n, option, TEMPLATE_DEFAULTS[n])]
    config = json.loads((bundle_folder("samconvex") / "configs" / "inference.json").read_text(encoding="utf-8"))
    lines += ["", "Of every registration, as of `monai-register`; defaults are those of samconvex:", ""]
    lines += [line for name in OF_ALL for line in _explained(name, FOR_INFERENCE[name], config.get(name))]
    return "\n".join([*lines, "", "More: common/run/README.md."])


def _explained(name: str, option: Option, default: object) -> list[str]:
    takes = "" if option.kind == "path" else f" ({wanted(option)})"
    default = "" if "by default" in option.text else _default(default)
    text = f"{option.text}{takes}" + (f"; {default}" if default else "")
    return _wrapped(name, text)


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"  --{name:18} ", subsequent_indent=" " * 23)


def _default(value: object) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, str) and value.startswith("$@bundle_root + "):
        return f"default BUNDLE{value.split(chr(39))[1]}"
    if isinstance(value, str) and value.startswith("$"):
        return ""
    return f"default {value if isinstance(value, str) else json.dumps(value)}"
