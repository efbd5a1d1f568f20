"""Command lines: options that do not exist are refused, and what the user did wrong is said in one sentence."""

import difflib
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from common import InputError

# How our argument checks begin, and a bundle that meets another version of `common`.
OUR_WORDS = re.compile(r"\w+\(\) '\w+' must |this bundle needs `common`")


def sentence_of(error: BaseException) -> str | None:
    """The sentence of the InputError among the causes of an error, or of one of our own checks; None without."""
    cause, seen = error, set()
    while cause is not None and id(cause) not in seen:
        ours = isinstance(cause, (ValueError, ImportError)) and OUR_WORDS.match(str(cause))
        if isinstance(cause, InputError) or ours:
            return str(cause)
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return None


def one_sentence_errors() -> None:
    """From now on an InputError that nobody catches ends the program with its sentence instead of a traceback.

    So do our own argument checks and the check of `common`'s version. For command lines: it replaces sys.excepthook,
    which looks through the causes that MONAI wraps around an error.
    """
    usual = sys.excepthook

    def hook(kind, error, traceback) -> None:
        if sentence := sentence_of(error):
            print(f"error: {sentence}", file=sys.stderr)
        else:
            usual(kind, error, traceback)

    if getattr(usual, "__name__", "") != "hook":
        sys.excepthook = hook


def options_of(words: list[str]) -> list[tuple[str, str]]:
    """--name value, --name=value and --name as pairs."""
    found = []
    for n, word in enumerate(words):
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            found.append((name, value if equals else words[n + 1] if n + 1 < len(words) else ""))
    return found


def refuse_unknown(option: str, name: str, known: Iterable[str], elsewhere: str = "") -> None:
    """Stop at an option whose `name` is not among the known ones.

    Args:
        elsewhere: who has an option of that name.

    Raises:
        InputError: naming the option, and whose it is, or the nearest one that exists.
    """
    known = set(known)
    if name not in known:
        if elsewhere:
            raise InputError(f"--{option}: there is no such option here, it belongs to {elsewhere}")
        near = difflib.get_close_matches(name, known, n=1)
        raise InputError(f"--{option}: there is no such option" + (f", did you mean --{near[0]}?" if near else ""))


def bundle_folder(name: str | os.PathLike) -> Path:
    """The folder of a bundle: given as such, or a name in bundles/ here, or beside this package.

    Raises:
        InputError: there is none.
    """
    beside = Path(__file__).parents[2]
    places = [Path(name), Path("bundles") / name, beside / "bundles" / name, *([beside] if beside.name == name else [])]
    for place in places:
        if (place / "configs" / "inference.json").is_file():
            return place.resolve()
    known = sorted(path.parents[1].name for path in beside.glob("bundles/*/configs/inference.json"))
    there = f"; there are {', '.join(known)}" if known else ""
    raise InputError(f"{name}: no such bundle, nor a folder with configs/inference.json{there}")
