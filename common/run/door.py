"""The front door: `python -m common register MOVING FIXED OUT`, and `monai-register` of an installed package.

It runs a bundle's own inference.json, with the options of `monai.bundle run` by the same names; so does the way in to
templates, `python -m common template SCANS OUT`. What takes seconds to load is imported where it is needed, so that
help and mistakes do without.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from common import InputError
from common.run.cli import bundle_folder, config_file, refuse_unknown, sentence_of
from common.run.help import help_of_register, help_of_template
from common.run.options import FOR_INFERENCE, OF_ALL, TEMPLATE, Option

PLACES = ("moving", "fixed", "output_dir")
OWN = ("method", "config")  # options of the door itself


def register(words: list[str]) -> str:
    """Register two scans, or the pairs of a table; the method and its options are chosen by what the scans are.

    Returns what there is to say; `words` are those of the command line.

    Raises:
        InputError: a word, an option or an input that is wrong; a pair that fails.
    """
    if {"--help", "-h"} & set(words):
        return help_of_register()
    options = _options(words)
    method, config = (options.pop(name, "") or "" for name in OWN)
    given = _values(options)
    if not given.get("output_dir"):
        raise InputError("register needs MOVING FIXED OUT; monai-register --help")
    if method in ("", "auto"):
        choice = _chosen(given)
        bundle, settings, reason = bundle_folder(choice.bundle), choice.options, choice.reason
        config = config or (str(bundle / "configs" / choice.config) if choice.config else "")
    else:
        bundle, settings, reason = bundle_folder(method), {}, "asked for by name"
    config = config_file(config, bundle) if config else ""
    asked = settings | given
    _refuse_others(asked, bundle)
    shown = {name: value for name, value in asked.items() if name in settings}
    line = shlex.join([bundle.name, *(f"--{n}={v}" for n, v in shown.items()), *([Path(config).name] * bool(config))])
    if not given.get("quiet"):
        print(f"method: {line} ({reason})", flush=True)
    told = {"bundle": bundle.name, "config": Path(config).name, "options": shown, "reason": reason}

    from common.run import progress
    from common.run.machine import keep_memory, take_threads
    from common.run.registrar import Registrar

    keep_memory()
    take_threads()
    try:
        with progress.telling(method=told):
            Registrar(bundle, config=config).run(**asked)
    except Exception as error:
        if (sentence := sentence_of(error)) is None or isinstance(error, InputError):
            raise
        raise InputError(sentence) from error
    return ""


def template(words: list[str]) -> str:
    """A template of mean shape and mean intensity from all scans of a folder or CSV; goes on where it was stopped.

    Returns what there is to say; `words` are those of the command line.

    Raises:
        InputError: a word, an option or a scan that is wrong; a registration that fails.
    """
    if {"--help", "-h"} & set(words):
        return help_of_template()

    from common.run.words import split

    table = TEMPLATE | {name: FOR_INFERENCE[name] for name in OF_ALL}
    given, places = split(words, set(table))
    for name in given:
        elsewhere = "the registration of a pair" if name in FOR_INFERENCE and name not in table else ""
        refuse_unknown(name, name, table, elsewhere)
    values = _values(given, table)
    if len(places) != 2:
        lacks = f"{places[2]}: is one word too many" if len(places) > 2 else "template needs SCANS and OUT"
        raise InputError(f"{lacks}; python -m common template --help")

    from common.run.template import make_template

    folder = make_template(*places, **values)
    return f"wrote {folder}: template.nii.gz, mean.nii.gz, spread.nii.gz, results.csv, and transform.h5 of each scan"


def _options(words: list[str]) -> dict[str, str | None]:
    """Every option and its word; the words without an option's name are the moving scan, the fixed one and OUT."""
    from common.run.words import split

    options, others = split(words, {*FOR_INFERENCE, *OWN})
    for name in options:
        if "::" in name or "#" in name:
            raise InputError(f"--{name}: parts of a config are set by `python -m monai.bundle run` or --config FILE")
        refuse_unknown(name, name, {*FOR_INFERENCE, *OWN})
    places = [name for name in PLACES if name not in options]
    if "pairs" in options or "dataset_dir" in options:
        places = [name for name in places if name == "output_dir"]
    if len(others) > len(places):
        raise InputError(f"{others[len(places)]}: is one word too many; monai-register --help")
    return options | dict(zip(places, others))


def _values(options: dict[str, str | None], table: dict[str, Option] = FOR_INFERENCE) -> dict[str, Any]:
    from common.run.values import read

    values = {}
    for name, word in options.items():
        option = table[name]
        if word is None and option.kind != "switch":
            raise InputError(f"--{name}: needs a value")
        values[name] = True if word is None else read(name, option, word)
    return values


def _chosen(given: dict[str, Any]) -> Any:
    """What suits the pair, or the first pair of several."""
    from common.run.choose import choose, facts_of
    from common.run.data import list_pairs

    columns = ("moving", "fixed", "moving_label", "fixed_label", "moving_points", "fixed_points", "moving_mask")
    columns += ("fixed_mask", "pairs", "dataset_dir", "output_dir")
    if not {"moving", "fixed", "pairs", "dataset_dir"} & set(given):
        raise InputError("register needs MOVING FIXED OUT; monai-register --help")
    row = list_pairs(**{name: given[name] for name in columns if name in given})[0]
    labels = tuple(row[name] for name in ("moving_label", "fixed_label") if name in row)
    how = {"header": given.get("header") or "", "series": given.get("series") or ""}
    return choose(facts_of(row["moving"], row["fixed"], labels, mode=given.get("prealign", "affine"), **how))


def _refuse_others(asked: dict[str, Any], bundle: Path) -> None:
    """Stop at an option that the bundle does not have."""
    config = json.loads((bundle / "configs" / "inference.json").read_text(encoding="utf-8"))
    for name in asked:
        elsewhere = FOR_INFERENCE[name].of or "another bundle"
        refuse_unknown(name, name, config, f"{elsewhere}; choose it with --method" if name not in config else "")
