"""The processes that torchrun has started for one command."""

import gc
import os
import time

import torch


def rank() -> int:
    """Number of this process under torchrun; 0 without."""
    return int(os.environ.get("RANK", 0))


def processes() -> int:
    """How many processes torchrun has started; 1 without."""
    return int(os.environ.get("WORLD_SIZE", 1))


def wait() -> None:
    """Until all processes are here."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave_group() -> None:
    """End the process group with its threads, last and for `atexit`: one that lives on may abort the program.

    A thread of gloo that lets go of a tensor while Python ends does, and one that does so while the group ends has been
    seen to wait for ever: hence half a second for what is under way. The group lives as long as anything names it, and
    a finished workflow, whose parts name each other, does until it is collected.
    """
    if torch.distributed.is_initialized():
        time.sleep(0.5)  # without the interpreter's lock, which that thread needs
        torch.distributed.destroy_process_group()
    gc.collect()
