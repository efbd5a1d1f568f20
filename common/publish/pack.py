"""Bundles as files to publish: a zip that runs alone, its SHA-256, and the list that MONAI's downloader reads."""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from common import InputError
from common.run.cli import bundle_folder
from common.space import io

COMMON = Path(__file__).parents[1]
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip can name


def pack(name: str, *, output: str | os.PathLike = "dist", url: str = "") -> list[Path]:
    """Write NAME_vVERSION.zip, NAME_vVERSION.zip.sha256, and add both to models/model_info.json in the folder.

    The zip's top folder is NAME; `common` lies in it, so that it needs nothing of this repository. The same files give
    the same bytes anywhere: names sorted, one fixed time, and stored, as the bytes of deflate depend on zlib's build
    (weights hardly shrink).

    Args:
        name: of a bundle, or its folder.
        output: folder for the files.
        url: folder of the published files, https://HOST/OWNER/REPOSITORY/releases/download/TAG; "source" in the list.

    Returns:
        The zip, the checksum and the list.

    Raises:
        InputError: no such bundle, weights missing, a version without an entry in the changelog, no place to write.
    """
    bundle = bundle_folder(name)
    meta = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    version = meta["version"]
    if version not in meta["changelog"]:
        raise InputError(f"{bundle / 'configs' / 'metadata.json'}: the changelog has no entry for version {version}")
    if not (bundle / "models" / "model.pt").is_file():
        raise InputError(f"{bundle / 'models' / 'model.pt'}: no such file; a bundle without weights is not downloaded")
    folder = io.output_folder(output)
    path = folder / f"{bundle.name}_v{version}.zip"
    io.replaced(path, lambda partial: _write_zip(bundle, partial))
    digest = sha256(path)
    checksum = folder / f"{path.name}.sha256"
    io.replaced(checksum, lambda partial: partial.write_text(f"{digest}  {path.name}\n"))
    entry = {"checksum": digest, "source": f"{url.rstrip('/')}/{path.name}" if url else path.name}
    return [path, checksum, _list(folder / "models" / "model_info.json", path.stem, entry)]


def verify(path: str | os.PathLike, checksum: str = "") -> str:
    """Compare a downloaded zip with its SHA-256.

    Args:
        path: the zip. MONAI's download calls it NAME.zip.
        checksum: the file NAME_vVERSION.zip.sha256 or the 64 digits in it; by default the file beside the zip.

    Returns:
        The 64 digits.

    Raises:
        InputError: a file is missing, or the zip is not the one that the checksum was made of.
    """
    path, given = Path(path), checksum or f"{path}.sha256"
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if not re.fullmatch("[0-9a-fA-F]{64}", given):
        if not Path(given).is_file():
            raise InputError(f"{given}: no such file; give the .sha256 file of the release, or its 64 digits")
        text = Path(given).read_bytes().decode(errors="replace").split()
        if not text or not re.fullmatch("[0-9a-fA-F]{64}", text[0]):
            raise InputError(f"{given}: does not begin with the 64 digits of a SHA-256")
        given = text[0]
    found = sha256(path)
    if found != given.lower():
        raise InputError(f"{path}: truncated or altered, its SHA-256 is not {given}; delete it and download it again")
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _contents(bundle: Path) -> Iterator[tuple[str, Path]]:
    """Names in the zip and their files: what a bundle consists of, without what runs have left in its folder.

    Of models/ these are the weights that a config names, so no exported network and no checkpoint.
    """
    configs = "".join(path.read_text(encoding="utf-8") for path in sorted((bundle / "configs").glob("*.json")))
    parts = ["LICENSE", "large_files.yml", "configs", "docs", "models", bundle.name]
    for root, names in ((bundle, parts), (COMMON.parent, [COMMON.name])):
        for name in names:
            top = root / name
            for path in [top] if top.is_file() else sorted(top.rglob("*")):
                inside = path.relative_to(root)
                hidden = any(part == "__pycache__" or part.startswith(".") for part in inside.parts)
                hidden |= inside.parts[:2] == ("common", "bundles")  # of an installed package: the bundles themselves
                stray = name == "models" and f"/models/{path.name}'" not in configs
                if path.is_file() and not hidden and not stray:
                    yield f"{bundle.name}/{inside.as_posix()}", path


def _write_zip(bundle: Path, path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, source in sorted(_contents(bundle)):
            info = zipfile.ZipInfo(name, EPOCH)
            info.create_system, info.external_attr = 3, 0o644 << 16
            file.writestr(info, source.read_bytes())


def _list(path: Path, key: str, entry: dict[str, str]) -> Path:
    """Add an entry to models/model_info.json, whose place is fixed by MONAI: it reads it at the tag of a release."""
    path.parent.mkdir(exist_ok=True)
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    content = dict(sorted((known | {key: entry}).items()))
    io.replaced(path, lambda partial: partial.write_text(json.dumps(content, indent=4) + "\n"))
    return path
