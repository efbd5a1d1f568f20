"""SHA-256 of a bundle's weights in its metadata.json, which loading compares: `python -m common.publish.checksums`."""

import json
import os
import re
import sys
from pathlib import Path

from common import InputError
from common.publish.pack import sha256
from common.run.cli import bundle_folder
from common.space.files import replaced

KEY = "weights_sha256"


def checksums(bundle: Path) -> dict[str, str]:
    """{models/NAME.pt: SHA-256} of the files that a bundle ships."""
    return {f"models/{file.name}": sha256(file) for file in sorted((bundle / "models").glob("*.pt"))}


def write_checksums(name: str | os.PathLike) -> Path:
    """Put them into metadata.json, where nothing else changes.

    Raises:
        InputError: there is no such bundle.
    """
    bundle = bundle_folder(name)
    path = bundle / "configs" / "metadata.json"
    listed = json.dumps(checksums(bundle), indent=4).replace("\n", "\n    ")
    text = re.sub(rf' *"{KEY}": {{[^}}]*}},\n', "", path.read_text(encoding="utf-8"))
    text = text.replace('    "monai_version"', f'    "{KEY}": {listed},\n    "monai_version"', 1)
    replaced(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return path


if __name__ == "__main__":
    try:
        for given in sys.argv[1:] or sorted(path.parents[1] for path in Path("bundles").glob("*/configs/metadata.json")):
            print(f"wrote {write_checksums(given)}")
    except InputError as error:
        sys.exit(f"error: {error}")
