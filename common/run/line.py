"""A command line of `monai.bundle run`, taken apart: its options, its other words, the config files that it names."""

import ast
import difflib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from common import InputError

HELP = ("-h", "--help")
ENDINGS = (".json", ".yaml", ".yml")  # of configs, for MONAI


def asks_help(words: list[str]) -> bool:
    return bool(set(HELP) & set(words))


class Words(NamedTuple):
    """A command line: options with their words (None: without one), and words that belong to none."""

    options: dict[str, str | None]
    others: list[str]


def split(words: list[str], known: set[str]) -> Words:
    """--name VALUE, --name=VALUE and --name as options; fire also takes one hyphen, and "-" for "_" in a name.

    A value may begin with one hyphen if it is no option's name; with two it is written --name=--value.

    Raises:
        InputError: an option is given twice.
    """
    options: dict[str, str | None] = {}
    others, waiting = [], None
    for word in words:
        name, equals, value = _parts(word)
        if not word.startswith("--") and (waiting is not None or name is None) and top(name) not in known:
            if waiting is None:
                others.append(word)
            else:
                options[waiting], waiting = word, None
            continue
        if word.startswith("--no") and not equals and name not in known and name[2:] in known:
            name, equals, value = name[2:], "=", "False"
        if name in options:
            raise InputError(f"--{name}: is given twice")
        options[name], waiting = (value, None) if equals else (None, name)
    return Words(options, others)


def _parts(word: str) -> tuple[str | None, str, str]:
    """Name, "=" and value of a word that is an option for fire; (None, "", "") for another."""
    if not re.match(r"--.|-[a-zA-Z]", word):
        return None, "", ""
    name, equals, value = word.lstrip("-").partition("=")
    return name.replace("-", "_"), equals, value


def top(name: str | None) -> str | None:
    """The part of a config to which a name such as network_def::channels belongs."""
    return name and re.split("::|#", name)[0]


def config_files(words: list[str]) -> list[str]:
    """The config files that a command line names, as fire reads the word, or those of its --args_file; [] of none.

    Raises:
        InputError: an --args_file that cannot be read; an option is given twice.
    """
    names = {"config_file", "args_file"}
    if not names & {_parts(word)[0] for word in words}:
        return []
    options = split(words, names).options
    files: Any = options.get("config_file")
    if not files and options.get("args_file"):
        files = _read("args_file", options["args_file"]).get("config_file")
    if isinstance(files, str) and files[:1] in ("[", "("):
        try:
            files = ast.literal_eval(files)
        except (ValueError, SyntaxError):  # fire also takes names without quotes
            files = [part.strip(" '\"") for part in files[1:-1].split(",")]
    if isinstance(files, str):
        files = [files] if Path(files).is_file() else files.split(",")
    return [str(file) for file in files or []]


def check_configs(files: list[str]) -> None:
    """Stop where one of the config files is not there, or is none.

    Raises:
        InputError: naming the file, and the nearest one that exists.
    """
    for file in files:
        _read("config_file", file)


def _read(option: str, file: str) -> dict:
    path = Path(file)
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"--{option} {file}: must be one of {', '.join(ENDINGS)}" + _near(path))
    if not path.is_file():
        raise InputError(f"--{option} {file}: no such file" + _near(path))
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix.lower() == ".json" else _yaml(file)
    except Exception as error:  # of the disk, of the text, of JSON's reader or MONAI's for YAML
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--{option} {file}: cannot be read ({reason})") from error
    if not isinstance(content, dict):
        raise InputError(f"--{option} {file}: must hold a dictionary, got {type(content).__name__}")
    return content


def _yaml(file: str) -> Any:
    from monai.bundle import ConfigParser  # takes seconds to load

    return ConfigParser.load_config_file(file)


def _near(path: Path) -> str:
    """What the name of a file that is not there may have been meant for."""
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"
    known = sorted(name for name in os.listdir(path.parent) if name.endswith(ENDINGS))
    near = difflib.get_close_matches(path.name, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {path.parent / near[0]}?"
    return f"; there are {', '.join(known)}" if known and len(known) < 12 else ""
