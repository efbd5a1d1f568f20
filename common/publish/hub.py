"""A bundle on the hubs: files for MONAI's `download --source huggingface_hub`, and its entry in MONAI's Model Zoo."""

import json
import os
import re
import shutil
from pathlib import Path

from common import InputError
from common.publish.pack import contents
from common.run.cli import bundle_folder
from common.space import io

LAYOUTS = ("huggingface", "model-zoo")
TAGS = ("monai", "medical", "image-registration")
HUB = "https://huggingface.co"
OF_MONAI = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1"
ZOO_SCHEMA = f"{OF_MONAI}/meta_schema_hf_20250321.json"


def publish(name: str, folder: str | os.PathLike, *, layout: str = "huggingface", repo: str = "") -> Path:
    """Write the files of a bundle for a hub.

    huggingface: the bundle's repository: the bundle at its root, `common/` beside configs/, a README.md.
    model-zoo: hf_models/NAME of Project-MONAI/model-zoo, for models that their owners host on Hugging Face: README.md,
    LICENSE, and metadata.json with the address.

    Args:
        name: of a bundle, or its folder.
        folder: new folder for the files.
        layout: huggingface or model-zoo.
        repo: OWNER/NAME on Hugging Face, of model-zoo.

    Raises:
        InputError: another layout, no such bundle, a folder that is there already, no repository.
    """
    if layout not in LAYOUTS:
        words = " or ".join(LAYOUTS)
        raise InputError(f"--layout must be {words}, got {layout}; `python -m common pack` makes zips for GitHub")
    if layout == "model-zoo" and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise InputError(f"--repo must be OWNER/NAME on Hugging Face, got {repo or 'nothing'}")
    bundle, target = bundle_folder(name), Path(folder)
    if target.exists():
        raise InputError(f"{target}: exists already; give a new folder")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if layout == "huggingface":
        _write_repository(bundle, partial)
    else:
        _write_entry(bundle, partial, f"{HUB}/{repo}")
    partial.rename(target)
    return target


def _write_repository(bundle: Path, folder: Path) -> None:
    for inside, source in contents(bundle):
        place = folder / inside.partition("/")[2]
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
    io.replaced(folder / "README.md", lambda path: path.write_text(_front(bundle) + _card(bundle), encoding="utf-8"))


def _write_entry(bundle: Path, folder: Path, address: str) -> None:
    """The three files that ci/verify_hf_model.py of the zoo asks for."""
    meta = _metadata(bundle)
    data = (bundle / "docs" / "data_license.txt").read_text(encoding="utf-8")
    card = _card(bundle, f"{address}/blob/main/")
    head, _, rest = card.partition("\n")
    where = f"Code and weights are on Hugging Face: [{address.removeprefix(HUB + '/')}]({address})."
    files = {
        "LICENSE": f"{(bundle / 'LICENSE').read_text(encoding='utf-8')}\n{data}",
        "README.md": f"{head}\n\n{where}\n{rest}",
        "metadata.json": json.dumps({**meta, "schema": ZOO_SCHEMA, "huggingface_url": address}, indent=4) + "\n",
    }
    for name, text in files.items():
        io.replaced(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))


def _metadata(bundle: Path) -> dict:
    return json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))


def _front(bundle: Path) -> str:
    """The front matter that Hugging Face reads."""
    tags = "\n".join(f"- {tag}" for tag in TAGS)
    front = "---\nlibrary_name: monai\nlicense: other\nlicense_name: see-docs-data-license\n"
    front += f"license_link: docs/data_license.txt\nversion: {_metadata(bundle)['version']}\ntags:\n{tags}\n"
    return f"{front}---\n\n"


def _card(bundle: Path, before: str = "") -> str:
    """docs/README.md with the links of the root, behind `before`; what does not travel keeps its words only."""
    text = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    root = bundle.parents[1]

    def moved(found: re.Match) -> str:
        place, hash_, anchor = found[2].partition("#")
        if not place or re.match("https?:", place):
            return found[0]
        there = (bundle / "docs" / place).resolve()
        for start in (bundle, root):
            if there.is_relative_to(start) and (start == bundle or there.is_relative_to(root / "common")):
                return f"{found[1]}({before}{there.relative_to(start).as_posix()}{hash_}{anchor})"
        return found[1]

    return re.sub(r"(\[[^\]]*\])\(([^)\s]+)\)", moved, text)
