"""Options on a command line that nobody asked for: MONAI and fire would take them without a word."""

import difflib
from collections.abc import Iterable

from common.io import InputError


def options_of(words: list[str]) -> list[tuple[str, str]]:
    """--name value, --name=value and --name as pairs."""
    found = []
    for n, word in enumerate(words):
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            found.append((name, value if equals else words[n + 1] if n + 1 < len(words) else ""))
    return found


def refuse_unknown(option: str, name: str, known: Iterable[str]) -> None:
    """Stop at an option whose `name` is not among the known ones.

    Raises:
        InputError: naming the option, and the nearest one that exists.
    """
    known = set(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise InputError(f"--{option}: there is no such option" + (f", did you mean --{near[0]}?" if near else ""))
