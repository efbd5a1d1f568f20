"""The command lines that the READMEs print."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STARTS = ("python", "torchrun", "bash", "srun", "antsApplyTransforms", "pip", "monailabel", "curl", "monai-register")


def lines_of(path: Path) -> Iterator[tuple[str, ...]]:
    """Commands in fences for bash and PowerShell, with variables put in, and in backticks where they are whole."""
    text, variables = path.read_text(), {}
    for shell, fence in re.findall(r"```(bash|powershell)\n(.*?)```", text, re.DOTALL):
        if shell == "powershell":
            fence = re.sub(r'^\$(\w+) = "(\S+)"', r"\1=\2", fence, flags=re.MULTILINE)
        for line in fence.replace("\\\n", " ").splitlines():
            if re.fullmatch(r"\w+=\$\(.*\)", line):
                continue  # known where it runs only: the name stays in the lines after it
            if assigned := re.fullmatch(r"(\w+)=(\S+)\s*(#.*)?", line):
                variables[assigned[1]] = assigned[2]
                continue
            line = re.sub(r"\$(\w+)", lambda found: variables.get(found[1], found[0]), line)
            yield from commands_of(shlex.split(line, comments=True))
    for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if code.startswith(tuple(f"{start} " for start in STARTS)) and "..." not in code:
            yield from commands_of(shlex.split(code))


def commands_of(words: list[str]) -> Iterator[tuple[str, ...]]:
    """The parts between `&&`."""
    parts: list[list[str]] = [[]]
    for word in words:
        parts.append([]) if word == "&&" else parts[-1].append(word)
    yield from (tuple(part) for part in parts if part)


def the_line(begin: str, path: Path) -> list[str]:
    """The one line of a README that begins so."""
    (words,) = {words for words in lines_of(path) if " ".join(words).startswith(begin)}
    return list(words)
