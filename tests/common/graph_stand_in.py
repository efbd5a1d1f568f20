"""A CUDA graph on the CPU: torch's operations are recorded, and replayed on the tensors that they had.

As with a real one, Python runs once, nothing is computed while recording (what is written to is put back), results are
there after a replay only, and what would wait for the host, or take a number from it, breaks off the recording.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "lift_fresh", "equal")


class Recorder(TorchDispatchMode):
    """Keeps every operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.before: list[tuple[Tensor, Tensor]] = []  # what was written to, and its values

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [(x, x.clone()) for x in tree_leaves(value) if isinstance(x, Tensor)]
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def put_back(self) -> None:
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again)):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(function: Callable[[], object], device: torch.device, stream: None) -> tuple[object, Callable[[], None]]:
    """In the place of `common.graphs.record`."""
    recorder = Recorder()
    try:
        with recorder:
            results = function()
    finally:
        recorder.put_back()
    with torch.no_grad():
        for x in tree_leaves(results):
            if isinstance(x, Tensor):
                x.fill_(float("nan"))
    return results, recorder.replay
