"""One progress bar for a run over pairs, on which any step can say what it is doing."""

import sys

from tqdm import tqdm

_bar: tqdm | None = None


def stage(text: str) -> None:
    """Show `text` behind the running bar; nothing happens without one."""
    if _bar is not None:
        _bar.set_postfix_str(text)


def start(total: int, name: str) -> None:
    """Open the bar for `total` pairs."""
    global _bar
    _bar = tqdm(total=total, desc=name, unit="pair", file=sys.stderr)


def advance() -> None:
    """One pair is done."""
    if _bar is not None:
        _bar.update()


def close() -> None:
    """Leave the bar as it is."""
    global _bar
    if _bar is not None:
        _bar.close()
    _bar = None
