"""A bundle as the files of a Hugging Face repository: what MONAI's `download --source huggingface_hub` reads."""

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

from common import InputError
from common.publish.pack import contents
from common.run.cli import bundle_folder
from common.space import io

TAGS = ("monai", "medical", "image-registration")


def publish(name: str, folder: str | os.PathLike, *, layout: str = "huggingface") -> Path:
    """Write the files of a bundle's repository: the bundle at its root, `common/` beside configs/, a README.md.

    Args:
        name: of a bundle, or its folder.
        folder: new folder for the files.
        layout: huggingface, the only one.

    Raises:
        InputError: another layout, no such bundle, a folder that is there already.
    """
    if layout != "huggingface":
        raise InputError(f"--layout must be huggingface, got {layout}; `python -m common pack` makes zips for GitHub")
    bundle, target = bundle_folder(name), Path(folder)
    if target.exists():
        raise InputError(f"{target}: exists already; give a new folder")
    writers = {inside.partition("/")[2]: partial(_copy, source) for inside, source in contents(bundle)}
    writers["README.md"] = lambda path: path.write_text(_card(bundle), encoding="utf-8")
    io.write_folder(target, writers)
    return target


def _copy(source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path)


def _card(bundle: Path) -> str:
    """docs/README.md behind the front matter that the hub reads; its links are those of the root."""
    meta = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    tags = "\n".join(f"- {tag}" for tag in TAGS)
    front = "---\nlibrary_name: monai\nlicense: other\nlicense_name: see-docs-data-license\n"
    front += f"license_link: docs/data_license.txt\nversion: {meta['version']}\ntags:\n{tags}\n---\n\n"
    text = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    root = bundle.parents[1]

    def moved(found: re.Match) -> str:
        place, hash_, anchor = found[2].partition("#")
        if not place or re.match("https?:", place):
            return found[0]
        there = (bundle / "docs" / place).resolve()
        for start in (bundle, root):  # what does not travel keeps its words and loses its link
            if there.is_relative_to(start) and (start == bundle or there.is_relative_to(root / "common")):
                return f"{found[1]}({there.relative_to(start).as_posix()}{hash_}{anchor})"
        return found[1]

    return front + re.sub(r"(\[[^\]]*\])\(([^)\s]+)\)", moved, text)
