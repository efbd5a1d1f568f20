"""One progress bar for a run over pairs, on which any step can say what it is doing, and what it warns of."""

import sys

from tqdm import tqdm

_bar: tqdm | None = None
_notes: list[str] = []


def note(text: str) -> None:
    """Keep a warning about the present pair for its row."""
    if text not in _notes:
        _notes.append(text)


def take_notes() -> str:
    """The warnings kept since the last call, in one string."""
    text = "; ".join(_notes)
    _notes.clear()
    return text


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
