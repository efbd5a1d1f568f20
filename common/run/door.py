"""The front doors: `python -m common register MOVING FIXED OUT`, and `monai-register` of an installed package; and
`python -m common series SERIES OUT`, for phases in time.

They run a bundle's own inference.json, with the options of `monai.bundle run` by the same names; so does the way in to
templates, `python -m common template SCANS OUT`. `python -m common run` is `monai.bundle run` itself. What takes
seconds to load is imported where it is needed, so that help and mistakes do without.
"""

import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import InputError
from common.run.cli import bundle_folder, config_file, one_sentence_errors, refuse_unknown, sentence_of
from common.run.help import help_of_register, help_of_series, help_of_template
from common.run.line import asks_help, check_configs, config_files, split, top
from common.run.options import FOR_INFERENCE, OF_ALL, OF_SERIES, TEMPLATE, Option

PLACES = ("moving", "fixed", "output_dir")
OWN = ("method", "config")  # options of the door itself
NOT_OF_SERIES = ("moving", "moving_label", "moving_points", "moving_mask", "moving_lesion", "fixed", "pairs")
NOT_OF_SERIES += ("dataset_dir", "start", "midspace", "save", "guide", "holdout_points", "series")
NEEDS = "register needs MOVING FIXED OUT: the moving scan, the fixed one, a folder for results; monai-register --help"
RUN = "python -m common run --config_file CONFIG --bundle_root BUNDLE [--OPTION VALUE ...]"


def register(words: list[str]) -> str:
    """Register two scans, or the pairs of a table; the method and its options are chosen by what the scans are.

    Returns what there is to say; `words` are those of the command line.

    Raises:
        InputError: a word, an option or an input that is wrong; a pair that fails.
    """
    if asks_help(words):
        return help_of_register()
    options = _options(words)
    method, config = (options.pop(name, "") or "" for name in OWN)
    given = _values(options)
    if not given.get("output_dir"):
        raise InputError(NEEDS)
    bundle, config, asked, told = _way(method, config, given, given)

    from common.run.registrar import Registrar

    with _running(told):
        Registrar(bundle, config=config).run(**asked)
    return ""


def series(words: list[str]) -> str:
    """Register every phase of a series in time to one of them, each started from what its neighbour has found.

    Returns what there is to say; `words` are those of the command line.

    Raises:
        InputError: a word, an option or an input that is wrong; a phase that fails.
    """
    if asks_help(words):
        return help_of_series()
    from common.run.series import DEFAULTS, phases_of, run_series

    options, places = split(words, {*FOR_INFERENCE, *OWN, *OF_SERIES})
    for name in options:
        where = "a pair; common/run/README.md says what a series takes" if name in NOT_OF_SERIES else ""
        refuse_unknown(name, name, {*FOR_INFERENCE, *OWN, *OF_SERIES} - {*NOT_OF_SERIES}, where)
    if len(places) != 2:
        raise InputError("series needs SERIES OUT, and no other words; python -m common series --help")
    method, config = (options.pop(name, "") or "" for name in OWN)
    given = DEFAULTS | _values(options, FOR_INFERENCE | OF_SERIES)
    word, cyclic = given.pop("reference", "0"), given.pop("cyclic", False)
    if word != "mean" and not re.fullmatch(r"\d{1,9}", word):
        raise InputError(f"--reference must be the number of a phase, from 0, or mean, got {word}")
    folder = Path(os.path.abspath(places[1]))
    reference = word if word == "mean" else int(word)
    first = 0 if reference == "mean" else reference
    files = phases_of(places[0], folder / "phases", reference=first)
    pair = {"moving": files[first - 1], "fixed": files[first]}
    bundle, config, asked, told = _way(method, config, given, given | pair)

    from common.run.registrar import Registrar

    with _running(told):
        path = run_series(Registrar(bundle, config=config), files, folder, reference, cyclic=cyclic, **asked)
    return f"wrote {path}: {len(files)} phases; warped.nii.gz holds them in one space, series.png their motion"


def _way(method: str, config: str, given: dict[str, Any], pair: dict[str, Any]) -> tuple[Path, str, dict, dict]:
    """Bundle, one more config, all options, and what the report is told of the choice, which is printed."""
    if method in ("", "auto"):
        choice = _chosen(pair)
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
    return bundle, config, asked, told


@contextlib.contextmanager
def _running(told: dict) -> Iterator[None]:
    """As a program of its own, which puts into reports what it is told; of an error, our sentence is what is left."""
    from common.run import progress
    from common.run.machine import keep_memory, take_threads

    keep_memory()
    take_threads()
    try:
        with progress.telling(method=told):
            yield
    except Exception as error:
        if (sentence := sentence_of(error)) is None or isinstance(error, InputError):
            raise
        raise InputError(sentence) from error


def run(words: list[str]) -> str:
    """`python -m monai.bundle run` by the same words, which says in a sentence what is wrong with a config file.

    MONAI gets no word of an option, but finds it as a value: one that begins with "%" is a name as any other.

    Raises:
        InputError: no config file, or one that cannot be read or is of no bundle here; what `take_options` refuses.
    """
    files = config_files(words)
    if not files:
        raise InputError(f"run needs the config of a bundle: {RUN}")
    check_configs(files)
    sys.argv = ["monai.bundle", "run", *words]  # where `take_options` reads them
    one_sentence_errors()

    import fire
    import monai.bundle

    from common.run.words import OF_MONAI, refuse_early, table_of, takes_options, values_of

    config = monai.bundle.ConfigParser.load_config_files(files)
    if not takes_options(config):
        raise InputError(f"--config_file {files[0]}: is no config of these bundles; give it to monai.bundle run")
    refuse_early()
    if not asks_help(words):
        values_of(words, config)
    options, others = split(words, set(config) | OF_MONAI)
    own = {name: word for name, word in options.items() if top(name) not in {*table_of(config), "help", "h"}}
    line = [f"--{name}" if word is None else f"--{name}={word}" for name, word in own.items()]
    fire.Fire({"run": monai.bundle.run}, command=["run", *others, *line], name="monai.bundle")
    return ""


def template(words: list[str]) -> str:
    """A template of mean shape and mean intensity from all scans of a folder or CSV; goes on where it was stopped.

    Returns what there is to say; `words` are those of the command line.

    Raises:
        InputError: a word, an option or a scan that is wrong; a registration that fails.
    """
    if asks_help(words):
        return help_of_template()

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
        raise InputError(NEEDS)
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
