"""Command lines: options that do not exist are refused, and what the user did wrong is said in one sentence."""

import difflib
import errno
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, get_args, get_origin

from common import InputError

# What a disk or a folder may say to a program that writes: no fault of its own, and nothing that a traceback explains.
OF_DISKS = {getattr(errno, name) for name in ("ENOSPC", "EFBIG", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE")}
OF_DISKS |= {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR}
# How our argument checks begin, and a bundle that meets another version of `common`.
OUR_WORDS = re.compile(r"\w+\(\) '\w+' must |this bundle needs `common`")


def sentence_of(error: BaseException) -> str | None:
    """The sentence of the InputError among the causes of an error, of one of our own checks, or a disk's; or None."""
    cause, seen = error, set()
    while cause is not None and id(cause) not in seen:
        ours = isinstance(cause, (ValueError, ImportError)) and OUR_WORDS.match(str(cause))
        if isinstance(cause, InputError) or ours:
            return str(cause)
        if isinstance(cause, OSError) and cause.errno in OF_DISKS:
            return f"{cause.filename or 'a file of the results'}: cannot be written or read ({cause.strerror})"
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return None


def printable() -> None:
    """Names in letters that a terminal does not have are printed as escapes; they would end the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def one_sentence_errors() -> None:
    """From now on an InputError that nobody catches ends the program with its sentence instead of a traceback.

    So do our own argument checks and the check of `common`'s version. For command lines: it replaces sys.excepthook,
    which looks through the causes that MONAI wraps around an error.
    """
    usual = sys.excepthook
    printable()

    def hook(kind, error, traceback) -> None:
        if sentence := sentence_of(error):
            print(f"error: {sentence}", file=sys.stderr)
        else:
            usual(kind, error, traceback)

    if getattr(usual, "__name__", "") != "hook":
        sys.excepthook = hook


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
        kind = name.removesuffix("_mask") or name
        sides = [f"{role}_{kind}" for role in ("fixed", "moving")]  # of which it says no side
        near = sides if known.issuperset(sides) else difflib.get_close_matches(name, known, n=1)
        meant = " or ".join(f"--{word}" for word in near)
        raise InputError(f"--{option}: there is no such option" + (f", did you mean {meant}?" if near else ""))


def bundle_folder(name: str | os.PathLike) -> Path:
    """The folder of a bundle: given as such, or a name in bundles/ here, beside this package, or installed in it.

    Raises:
        InputError: there is none.
    """
    beside = Path(__file__).parents[2]
    homes = [Path("bundles"), beside / "bundles", Path(__file__).parents[1] / "bundles"]
    places = [Path(name), *(home / name for home in homes), *([beside] if beside.name == name else [])]
    for place in places:
        if (place / "configs" / "inference.json").is_file():
            return place.resolve()
    known = sorted({path.parents[1].name for home in homes for path in home.glob("*/configs/inference.json")})
    there = f"; there are {', '.join(known)}" if known else ""
    raise InputError(f"{name}: no such bundle, nor a folder with configs/inference.json{there}")


def config_file(config: str, bundle: Path) -> str:
    """One more config: a file, or the name of one of the bundle.

    Raises:
        InputError: there is none.
    """
    for path in (Path(config), bundle / "configs" / config):
        if path.is_file():
            return os.path.abspath(path)
    raise InputError(f"--config {config}: no such file, nor a config of {bundle.name}")


def exact_words(name: str, command: Callable[..., str], words: list[str]) -> list[str]:
    """The words of `python -m common NAME WORDS`, so written that fire hands them on as they were typed.

    fire takes 2021_03_15 for a number, [a,b] for a list and a,b for two: what a command takes as text is quoted, and
    what is True or False becomes that.

    Raises:
        InputError: an option that the command does not have, one without its value, too few or too many words.
    """
    parameters = inspect.signature(command).parameters
    places = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    several = bool(places) and parameters[places[-1]].kind is inspect.Parameter.VAR_POSITIONAL
    given, quoted, count, rest = set(), [], 0, list(words)
    while rest:
        word = rest.pop(0)
        if re.match(r"--.|-[a-zA-Z]", word):
            option, equals, value = word.lstrip("-").partition("=")
            option = _whole_name(option.replace("-", "_"), parameters)
            refuse_unknown(option, option, parameters)
            if option in given:
                raise InputError(f"--{option}: is given twice")
            parameter = parameters[option]
            choices = _choices(parameter)
            value = value if equals else _next(rest, switch=parameter.annotation is bool or choices, choices=choices)
            quoted.append(f"--{option}={_quoted(option, parameter, value)}")
        else:
            if count >= len(places) and not several:
                raise InputError(f"{word}: is one word too many for {name}; python -m common {name} --help")
            option, count = places[min(count, len(places) - 1)], count + 1
            quoted.append(_quoted(option, parameters[option], word))
        given.add(option)
    needed = [n for n in places if parameters[n].default is parameters[n].empty]
    if lacks := [n for n in needed if n not in given and parameters[n].kind is not inspect.Parameter.VAR_POSITIONAL]:
        raise InputError(f"{name} needs {' and '.join(map(str.upper, lacks))} as well; python -m common {name} --help")
    return quoted


def _whole_name(option: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    """-r is --reference, if that is the only one with an r."""
    long = [n for n in parameters if len(option) == 1 and n.startswith(option)]
    return long[0] if len(long) == 1 else option


def _next(rest: list[str], *, switch: object = False, choices: tuple[str, ...] = ()) -> str | None:
    """Take the value that follows an option, if there is one; None of a switch, or a choice, that is alone."""
    if not rest or rest[0].startswith("--") or (switch and rest[0].lower() not in ("true", "false", *choices)):
        return None
    return rest.pop(0)


def _choices(parameter: inspect.Parameter) -> tuple[str, ...]:
    return get_args(parameter.annotation) if get_origin(parameter.annotation) is Literal else ()


def _quoted(name: str, parameter: inspect.Parameter, word: str | None) -> str:
    if parameter.annotation is bool:
        if word is not None and word.lower() not in ("true", "false"):
            raise InputError(f"--{name}: is True or False, got {word}")
        return "True" if word is None else word.capitalize()
    if choices := _choices(parameter):  # alone it is the second, the first is none
        word = {"true": choices[1], "false": choices[0]}.get((word or "true").lower(), word)
        if word not in choices:
            raise InputError(f"--{name}: is one of {', '.join(choices)}, got {word}")
        return repr(word)
    if word is None:
        raise InputError(f"--{name}: needs a value")
    if not word.strip() and parameter.default is parameter.empty:
        raise InputError(f"{name.upper()}: needs a value, got an empty word")
    return repr(word) if parameter.annotation is str else word
