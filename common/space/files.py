"""Folders, files and tables of results: each whole, or not at all, whoever else writes beside it."""

import contextlib
import csv
import errno
import hashlib
import itertools
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib

from common import InputError

try:
    import resource
except ImportError:  # not on Windows
    resource = None

HOST = re.sub(r"[^\w.]", "_", socket.gethostname())[:40]
DAY = 24 * 3600  # seconds
HEADERS_OF = {".mhd": (".raw", ".zraw"), ".nhdr": (".raw", ".raw.gz"), ".hdr": (".img",)}  # files of two parts
_NUMBERS = itertools.count()


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file, as sha256sum says; of a folder, or of a header with its data beside it, of the bytes of the
    files one after the other, in the order of their names."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
    elif path.suffix.lower() in HEADERS_OF:
        others = (path.with_suffix(ending) for ending in HEADERS_OF[path.suffix.lower()])
        files = sorted([path, *(file for file in others if file.is_file())])
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while part := stream.read(2**20):
                digest.update(part)
    return digest.hexdigest()


def write_folder(path: Path, writers: dict) -> None:
    """Create the folder `path` with one file per entry {name: function(path)}: whole, or not at all.

    The files are written beside it first; an older folder of that name is replaced only when all of them exist.

    Raises:
        InputError: the disk is full, or the folder cannot be written to.
    """
    partial = beside(path, ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        for name, write in writers.items():
            write(partial / name)
            _refuse_cut_off(partial / name)
        _put(partial, path)
    except Exception as error:
        raise _unwritten(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put(partial: Path, path: Path) -> None:
    """Give a folder its name; what had it goes, also if another process puts its own there at the same moment."""
    for _ in range(100):
        old = beside(path, ".old")
        with contextlib.suppress(FileNotFoundError):
            path.rename(old)
        try:
            partial.rename(path)
            return
        except OSError as error:  # another process was quicker
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                with contextlib.suppress(OSError):
                    old.rename(path)
                raise
        finally:
            shutil.rmtree(old, ignore_errors=True)


def output_folder(path: str | os.PathLike) -> Path:
    """The folder for results, created; asked for before anything is computed.

    Raises:
        InputError: it is a file, or cannot be written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        why = "it is a file, no folder" if path.is_file() else error.strerror
        raise InputError(f"{path}: results cannot be written there ({why})") from error
    return path


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed has left of `write_folder` and `replaced` in a folder for results.

    The names say which process wrote them, on which machine: what one writes that still runs is left alone, and what
    another machine writes until it has not changed for a day.
    """
    for path in folder.glob(".*"):
        found = re.match(r"\.([\w.-]*)-(\d+)-\d+(\.|$)", path.name)
        ours = found or re.fullmatch(r"\..*\.(partial|old)|\.\d+\..*", path.name)  # the latter of former versions
        if not ours or (found and found[1] == HOST and _runs(int(found[2]))):
            continue
        try:
            if (not found or found[1] != HOST) and time.time() - path.stat().st_mtime < DAY:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError:  # another process has done it
            continue


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def beside(path: Path, ending: str) -> Path:
    """A name for a file or folder that becomes `path`: no other process, and no other call, has it."""
    return path.with_name(f".{HOST}-{os.getpid()}-{next(_NUMBERS)}{ending}")


def replaced(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Let `write` make a file beside `path`, with the same ending, and put it in its place: whole, or not at all.

    Raises:
        InputError: the disk is full, the folder is missing or cannot be written to.
    """
    path = Path(path)
    partial = beside(path, "".join(path.suffixes[-2:]) if path.name.lower().endswith(".gz") else path.suffix)
    try:
        with partial.open("wb"):
            pass
        write(partial)
        _refuse_cut_off(partial)
        partial.replace(path)
    except Exception as error:
        raise _unwritten(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _unwritten(path: Path, error: Exception) -> Exception:
    """A sentence for what the disk has said; any other error as it is."""
    if isinstance(error, OSError) and error.errno:
        return InputError(f"{path}: cannot be written ({os.strerror(error.errno)})")
    if isinstance(error, (RuntimeError, OSError)) and (reason := _disk_says(path.parent)):  # h5py and ITK hide it
        return InputError(f"{path}: cannot be written ({reason})")
    return error


def _disk_says(folder: Path) -> str:
    """Why a mebibyte cannot be written to a folder; "" if it can."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            missing = 2**20
            while missing:
                missing -= file.write(bytes(missing))
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0] if resource else -1
            return "" if resource is None or limit == resource.RLIM_INFINITY else os.strerror(errno.EFBIG)
    except OSError as error:
        return os.strerror(error.errno)


def _refuse_cut_off(path: Path) -> None:
    """Stop at a NIfTI file that is shorter than its header says: not every writer says that a disk is full.

    The last bytes of a gzip file hold its length, which a file that was cut off does not.

    Raises:
        OSError: no space.
    """
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        return
    values = nib.load(path).dataobj
    expected = values.offset + math.prod(values.shape) * values.dtype.itemsize
    length = path.stat().st_size
    if path.name.lower().endswith(".gz"):
        with path.open("rb") as file:
            file.seek(-4, os.SEEK_END)
            length, expected = int.from_bytes(file.read(4), "little"), expected % 2**32
    if length != expected:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def write_table(path: Path, rows: list[dict]) -> None:
    """Write rows as CSV in UTF-8, the columns in order of appearance; replaced in one step."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def write(partial: Path) -> None:
        with partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    replaced(path, write)


@contextlib.contextmanager
def locked(path: Path, patience: float = 30) -> Iterator[None]:
    """Keep other processes from changing a table while it is read and written anew.

    The lock is a file beside it. One of a process that ended without removing it is removed; after `patience` seconds
    the table is written without, as a row may be lost then but nothing waits for ever.
    """
    lock, end = path.with_name(f".{path.name}.lock"), time.monotonic() + patience
    held = False
    while not held and time.monotonic() < end:
        try:
            os.close(os.open(mine := beside(path, ".lock"), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except OSError:
            break  # the folder cannot be written to, which the writer will say
        try:
            mine.write_text(f"{HOST} {os.getpid()}", encoding="utf-8")
            os.link(mine, lock)  # a link is made whole or not at all, on shared disks too
            held = True
        except FileExistsError:
            _remove_stale(lock)
            time.sleep(0.02)
        except OSError:  # a disk without links
            break
        finally:
            mine.unlink(missing_ok=True)
    try:
        yield
    finally:
        if held:
            lock.unlink(missing_ok=True)


def _remove_stale(lock: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        held = lock.read_text(encoding="utf-8")
        host, process = held.split()
        if host == HOST and not _runs(int(process)) or time.time() - lock.stat().st_mtime > 60:
            lock.rename(taken := beside(lock, ".lock"))
            if taken.read_text(encoding="utf-8") != held:  # another process was quicker, and this is its own
                os.link(taken, lock)
            taken.unlink()
