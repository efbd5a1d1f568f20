"""The command line of `monai.bundle run`: its words become values of options before MONAI looks at them.

On their way through fire and MONAI's config parser a date in a path becomes a number, "#" becomes "::", and what begins
with "$", "@" or "%" is code, a reference or another file. So the configs name `take_options` in their "initialize": it
reads the words anew, checks them by the table, and gives the parser values that it takes as they are. What MONAI
evaluates before, --bundle_root and imports, is refused by `common.run.first`, which the configs import. What it reads
before even that, the config files and a value that begins with "%", which it takes for one, is out of reach there:
`python -m common run` takes the same words, reads the config files first, and hands MONAI no word of an option.
"""

import ast
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle import run as bundle_run

from common import InputError
from common.run import progress
from common.run.cli import refuse_unknown
from common.run.help import help_of
from common.run.line import asks_help, config_files, split, top
from common.run.machine import keep_memory, take_threads
from common.run.options import FOR_INFERENCE, FOR_TRAINING, Option
from common.run.values import check, read

EVALUATED = ("$", "@", "%")  # what MONAI's configs take a string for that begins with one of these: code, or references
OF_MONAI = set(inspect.signature(bundle_run).parameters) - {"override"}


def table_of(config: dict) -> dict[str, Option]:
    """The table of options for a config: that of the training, or of the inference."""
    return FOR_TRAINING if "train" in config else FOR_INFERENCE


def takes_options(config: dict) -> bool:
    """Whether a config has its options from `take_options`."""
    steps = config.get("initialize", [])
    return any(isinstance(step, dict) and step.get("_target_") == "common.run.words.take_options" for step in steps)


def refuse_early() -> None:
    """End the program at a word of its command line that MONAI would evaluate before `take_options` sees it."""
    if "run" not in sys.argv[1:3]:
        return
    for name, word in split(sys.argv[sys.argv.index("run") + 1 :], OF_MONAI).options.items():
        text = (word or "").strip()
        if name == "bundle_root" and not text or name == "bundle_root" and text.startswith(EVALUATED):
            sys.exit(f"error: --bundle_root: needs the folder of the bundle, got {text or 'an empty word'}")
        if re.match(r"\$\s*(import|from)\s", text):
            sys.exit(f"error: --{name}: values of a command line are never evaluated, got {text}")


def take_options() -> None:
    """Put the options of the command line, or of a `Registrar`, into the config that names this in "initialize".

    Asked for help, print it and end the program. MONAI hands what a config runs no way to the config itself: its parser
    is found among the callers.

    Raises:
        InputError: an option that no config has, a word that is not what its option takes.
    """
    parser, workflow = _caller(ConfigParser), _caller(ConfigWorkflow)
    given = getattr(workflow, "given_options", None)
    if given is None:
        given = _of_command_line()
        if given and parser is not None and "train" not in parser.get():
            keep_memory()
            take_threads()
    if parser is not None:
        parser.ref_resolver.resolved_content.update(given)
        progress.hush(given.get("quiet", parser.config.get("quiet", False)))
        if threads := given.get("threads", parser.config.get("threads")):
            take_threads(threads)
        if "bundle_root" in given:  # read by MONAI already, and perhaps not as it stands
            sys.path.insert(1, os.path.abspath(given["bundle_root"]))


def _caller(kind: type) -> Any:
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), kind):
            return found
        frame = frame.f_back
    return None


def _of_command_line() -> dict[str, Any]:
    """Values by name, if this process is `python -m monai.bundle run`."""
    if "run" not in sys.argv[1:3]:
        return {}
    words = sys.argv[sys.argv.index("run") + 1 :]
    words = words[: words.index("--")] if "--" in words else words  # what follows is for fire
    if not (files := config_files(words)):
        return {}
    config = ConfigParser.load_config_files(files)
    if asks_help(words):
        print(help_of(files[0], config, table_of(config)), flush=True)
        sys.exit(0)
    values = values_of(words, config)
    check_root(str(values.get("bundle_root", config.get("bundle_root", "."))), config, files[0])
    return values


def check_root(root: str, config: dict, file: str) -> None:
    """Stop where the bundle's own package is not to be found."""
    package = str(config.get("network_def", {}).get("_target_", "monai")).partition(".")[0]
    if not (Path(root) / package / "__init__.py").is_file() and (
        (Path(root) / package).is_dir() or importlib.util.find_spec(package) is None
    ):
        beside = Path(file).parent.parent
        hint = f"; did you mean {beside}?" if (beside / package / "__init__.py").is_file() else ""
        raise InputError(f"--bundle_root {root}: is not the folder of this bundle, it holds no {package}{hint}")


def values_of(words: list[str], config: dict) -> dict[str, Any]:
    """The options among the words of a command line as values, for the config of its files.

    Raises:
        InputError: as `take_options`.
    """
    table, plain = table_of(config), {name for name in config if isinstance(name, str)}
    options, others = split(words, plain | OF_MONAI)
    values: dict[str, Any] = {}
    for name, word in options.items():
        refuse_unknown(name, top(name), plain | OF_MONAI, _elsewhere(top(name), table))
        if name in OF_MONAI:
            continue
        if name == "bundle_root":
            values[name] = check(name, Option("path", ""), word or "")
        elif name in table:
            option = table[name]
            if word is None and option.kind != "switch":
                raise InputError(f"--{name}: needs a value")
            values[name] = True if word is None else read(name, option, word)
        else:
            refuse_code(name, word or "")
    if others and others[0] not in config:  # the first may name what is to run
        raise InputError(f"{others[0]}: belongs to no option; a name with spaces needs quotes")
    return values


def _elsewhere(name: str, table: dict[str, Option]) -> str:
    """Whose option it is that this config does not have."""
    if name in table:
        return table[name].of or "another bundle"
    if name in FOR_TRAINING:
        return "the training, train.json"
    return "the inference, inference.json" if name in FOR_INFERENCE else ""


def refuse_code(name: str, word: str) -> None:
    """Stop at a value for a part of the config that MONAI would evaluate, refer to, or build an object of.

    Raises:
        InputError: such a value.
    """
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        value = word
    if any(text.startswith(EVALUATED) or text == "_target_" for text in [word, *_texts(value)]):
        raise InputError(f"--{name}: values of a command line are never evaluated; write {word} into a config file")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, (list, tuple, set)):
        for part in value:
            yield from _texts(part)
