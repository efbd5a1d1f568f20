"""Shared parts of the registration bundles.

Conventions, everywhere in this package:
- Axes are array order = NIfTI i, j, k; shapes are (B, C, I, J, K).
- `disp` (B, 3, I, J, K): component c moves along axis c, in voxels of its own grid; pull-back on the fixed grid,
  warped(x) = moving(x + disp(x)), the same as MONAI's DDF.
- Voxel centres are integers (corner-aligned). Coordinates are at least float32, whatever the autocast type.
- compose(first, then)(x) = then(x) + first(x + then(x)): warping by the composite equals warping by `first` and the
  result by `then`.
- Other frames carry a suffix (`_mm`, `_ras`, `_lps`) and live in `space` and `deploy` only; `quality` measures in mm
  what `space` maps, and `phantom` is defined in mm.

The folders, from the lowest to the highest; each __init__.py says what it may import, tests/test_imports.py checks it:
ops, then the files here (fields, losses, mind, phantom, refine: the science), space, quality, run, and beside each
other train, publish, label, deploy.
"""

import importlib
from pathlib import Path

__version__ = "0.2.0"


class InputError(ValueError):
    """Something is wrong with what the user gave; the message is one sentence that names the file and the fault."""


class RegistrationWarning(UserWarning):
    """Something about this pair that makes its result doubtful; runs keep it in the pair's row."""


class Later:
    """A module that takes seconds to load, loaded when something of it is first used: help and mistakes do without."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> object:
        return getattr(importlib.import_module(self._name), attribute)


def require(minimum: str, below: str) -> None:
    """Stop with an ImportError unless minimum <= this version < below, naming both and where `common` came from."""

    def key(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split("."))

    if not key(minimum) <= key(__version__) < key(below):
        found = f"version {__version__} is loaded from {Path(__file__).parent}"
        raise ImportError(f"this bundle needs `common` >= {minimum}, < {below}, but {found}")


class EmptyResult(RegistrationWarning):
    """What a command has written is empty, or nearly so."""
