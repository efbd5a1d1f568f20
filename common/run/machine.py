"""What a run takes of the machine it is on: the threads that it computes with, and the memory that it keeps."""

import ctypes
import os

import torch

MALLOPT = ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20))  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of glibc


def keep_memory() -> None:
    """Let this process keep the memory of tensors that it frees, for the next ones, until `give_back_memory`.

    glibc returns blocks above 32 MiB to the system at once, which then fills every page of the next one with zeros
    again. With another C library nothing happens. For programs of their own; a host would hold its peak for ever.
    """
    for option, value in MALLOPT:
        _glibc("mallopt", option, value)


def give_back_memory() -> None:
    """Return to the system what is kept and free, so that the memory of this process is what it uses."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *values: int) -> None:
    try:
        getattr(ctypes.CDLL(None), function)(*values)
    except (AttributeError, OSError, TypeError):  # another C library
        return


def leave_room() -> None:
    """Take no more threads than there are cores that other programs leave idle, at least one.

    More of them wait for each other: on a machine that is busy, two cost twice the CPU time of one. Who has set
    OMP_NUM_THREADS has chosen. The load is that of the last minute; where nobody knows it, all cores are taken.
    """
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "getloadavg"):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    usual = torch.get_num_threads()  # one a physical core
    torch.set_num_threads(max(min(usual, cores - round(os.getloadavg()[0])), 1))
