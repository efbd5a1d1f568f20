"""From words of a command line to values of options, and whether an option takes a value.

Paths and names are taken as they stand, numbers are numbers, and nothing is ever evaluated.
"""

import ast
import difflib
import json
import math
import os
import re
from collections.abc import Callable
from typing import Any

import torch

from common import InputError
from common.run.options import Option, wanted
from common.space.mapping import LARGEST

YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
NONE = ("none", "null")
WHOLE = re.compile(r"[+-]?\d{1,18}")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def read(name: str, option: Option, word: str) -> Any:
    """The value that a word of a command line stands for; nothing is evaluated.

    Raises:
        InputError: the word is not what the option takes.
    """
    if option.kind == "path":
        return check(name, option, word)
    if not word.strip():
        return check(name, option, "")
    if word.strip().lower() in NONE and option.none and word.strip() not in option.words:
        return None
    return check(name, option, _READERS.get(option.kind, str)(word.strip()))


def check(name: str, option: Option, value: Any) -> Any:
    """`value`, if the option takes it; a switch written as a word becomes True or False.

    Raises:
        InputError: it does not.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        if option.none and value is None or option.empty:
            return value
        raise InputError(f"--{name}: needs {wanted(option)}, got {'nothing' if value is None else 'an empty word'}")
    return _CHECKS[option.kind](name, option, value)


def _refuse(name: str, option: Option, value: Any, hint: str = "") -> InputError:
    shown = value if isinstance(value, str) else repr(value)
    shown = shown if len(shown) < 80 else shown[:77] + "..."
    return InputError(f"--{name} must be {wanted(option)}, got {shown}" + (f"; did you mean {hint}?" if hint else ""))


def _as_number(word: str) -> Any:
    """A word as the whole or other number that it is; else the word."""
    if WHOLE.fullmatch(word):
        return int(word)
    return float(word) if NUMBER.fullmatch(word) else word


def _as_numbers(word: str) -> Any:
    """[1,2,3], (1,2,3) or 1,2,3 as a list of numbers; else the word."""
    inner = word[1:-1] if word[:1] + word[-1:] in ("[]", "()") else word
    parts = [part.strip() for part in inner.split(",")]
    if len(parts) == 1 and inner == word:
        return _as_number(word)
    return [_as_number(part) for part in parts]


def _as_data(word: str) -> Any:
    """Lists, dictionaries, numbers and names of JSON or Python."""
    for reader in (json.loads, ast.literal_eval):  # literals only: neither runs anything
        try:
            return reader(word)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    inner = word[1:-1] if word[:1] + word[-1:] == "[]" else ""  # [a,b], names without quotes
    if not inner or set(inner) & set("[]{}'\""):
        return word
    return [_as_number(part.strip()) for part in inner.split(",")]


def _path(name: str, option: Option, value: Any) -> Any:
    several = name in ("moving", "fixed") and isinstance(value, (list, tuple))  # of several contrasts
    parts = value if several else [value]
    if not parts or not all(isinstance(part, (str, os.PathLike)) and os.fspath(part) for part in parts):
        raise _refuse(name, option, value)
    if any("\0" in os.fspath(part) for part in parts):
        raise InputError(f"--{name}: a path holds no zero byte")
    return value


def _word(name: str, option: Option, value: Any) -> str:
    if isinstance(value, str) and value in option.words:
        return value
    near = difflib.get_close_matches(str(value).lower(), option.words, n=1)
    raise _refuse(name, option, value, near[0] if near else "")


def _number(name: str, option: Option, value: Any) -> Any:
    whole = option.kind == "whole"
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not real or not option.low <= value <= option.high:
        raise _refuse(name, option, value)
    if whole and not isinstance(value, int):
        near = min(max(round(value), math.ceil(option.low)), math.floor(option.high))
        raise _refuse(name, option, value, str(near))
    return value


def _numbers(name: str, option: Option, value: Any) -> Any:
    one = isinstance(value, (int, float))
    if not one and not (isinstance(value, (list, tuple)) and len(value) == 3):
        raise _refuse(name, option, value)
    for part in [value] if one else value:
        _number(name, option, part)
    return value


def _switch(name: str, option: Option, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).lower() if isinstance(value, (str, int)) else ""
    if word in YES + NO:
        return word in YES
    near = difflib.get_close_matches(word, ("true", "false"), n=1)
    raise _refuse(name, option, value, near[0].capitalize() if near else "")


def _range(name: str, option: Option, value: Any) -> Any:
    good = isinstance(value, (list, tuple)) and len(value) == 2
    good = good and all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in value)
    if not good or not value[0] < value[1]:
        swapped = good and value[0] != value[1]
        raise _refuse(name, option, value, f"[{value[1]},{value[0]}]" if swapped else "")
    return value


def _grid(name: str, option: Option, value: Any) -> Any:
    good = isinstance(value, (list, tuple)) and len(value) == 3
    if not good or not all(isinstance(n, int) and not isinstance(n, bool) and n > 1 for n in value):
        raise _refuse(name, option, value)
    if math.prod(value) > LARGEST:
        raise InputError(f"--{name}: {' x '.join(map(str, value))} voxels are more than {LARGEST}")
    return value


def _device(name: str, option: Option, value: Any) -> Any:
    text = str(value)
    if not re.fullmatch(r"cpu|cuda(:\d+)?|[a-z]+(:\d+)?", text):
        near = f"cuda:{text}" if text.isdigit() else next(iter(difflib.get_close_matches(text, ("cpu", "cuda:0"))), "")
        raise _refuse(name, option, value, near)
    try:
        (torch.ones(1, device=text) + 1).cpu()
    except Exception as error:  # torch has several kinds for what is not there, or cannot compute
        there = ", ".join(["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))])
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        text += f": not a device that computes here ({reason}); here is {there}"
        near = difflib.get_close_matches(str(value), ("cpu", "cuda"), n=1)
        hint = f"; did you mean {near[0]}?" if near and near[0] != str(value).partition(":")[0] else ""
        raise InputError(f"--{name} {text}{hint}") from error
    return value


def _data(name: str, option: Option, value: Any) -> Any:
    if not isinstance(value, (list, tuple, dict)):
        raise _refuse(name, option, value)
    if name == "groups" and not (
        isinstance(value, dict)
        and all(isinstance(v, dict) and isinstance(v.get("members"), list) and v["members"] for v in value.values())
        and all(type(n) is int and 0 < n < 2**63 for v in value.values() for n in v["members"])
    ):
        raise InputError(f'--{name} must be groups of labels as {{"NAME": {{"members": [1, 2]}}}}, got {value}')
    return value


_READERS: dict[str, Callable[[str], Any]] = {
    "whole": _as_number,
    "number": _as_number,
    "numbers": _as_numbers,
    "range": _as_numbers,
    "grid": _as_numbers,
    "data": _as_data,
}
_CHECKS: dict[str, Callable[[str, Option, Any], Any]] = {
    "path": _path,
    "word": _word,
    "whole": _number,
    "number": _number,
    "numbers": _numbers,
    "switch": _switch,
    "range": _range,
    "grid": _grid,
    "device": _device,
    "data": _data,
}
