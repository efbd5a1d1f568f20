"""What a run takes of the machine it is on: the threads that it computes with, and the memory that it keeps."""

import ctypes
import os
from typing import Any

import torch

MALLOPT = ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20))  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of glibc


def keep_memory() -> None:
    """Let this process keep the memory of tensors that it frees, for the next ones.

    glibc returns blocks above 32 MiB to the system at once, which then fills every page of the next one with zeros
    again. With another C library nothing happens. For programs of their own; a host would hold its peak for ever.
    """
    for option, value in MALLOPT:
        _glibc("mallopt", option, value)


def kept_memory() -> int:
    """Bytes of this process that are free, and kept for its next tensors; 0 with another C library."""
    info = _glibc("mallinfo2", returns=_MallInfo)
    return info.fordblks if info else 0


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks")]
    _fields_ += [(name, ctypes.c_size_t) for name in ("fsmblks", "uordblks", "fordblks", "keepcost")]


def _glibc(name: str, *values: int, returns: type | None = ctypes.c_int) -> Any:
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # another C library
        return None
    function.restype = returns
    return function(*values)


def take_threads(number: int | None = None) -> None:
    """Compute with so many threads; None: with no more than there are cores that other programs leave idle.

    More of them wait for each other: on a machine that is busy, two cost twice the CPU time of one. Who has set
    OMP_NUM_THREADS has chosen. The load is that of the last minute; where nobody knows it, all cores are taken.
    """
    if number is not None:
        torch.set_num_threads(number)
        return
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "getloadavg"):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    usual = torch.get_num_threads()  # one a physical core
    torch.set_num_threads(max(min(usual, cores - round(os.getloadavg()[0])), 1))
