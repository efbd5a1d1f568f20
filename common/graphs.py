"""CUDA graphs: what a host has enqueued kernel by kernel once, a GPU repeats by one launch.

A pass of SACB-Net is some three hundred launches. On small scans the host needs longer for them than the GPU.
"""

import collections
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor, nn

Results = Tensor | tuple[Tensor | None, ...]
KEPT = 2  # graphs of one function: each holds the memory that the function takes


def possible(device: torch.device) -> bool:
    """Whether a graph can be recorded on this device now."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()


class Graph(NamedTuple):
    """A recorded call: copy into `inputs`, `replay()`, read `results`."""

    inputs: tuple[Tensor, ...]
    results: Results
    replay: Callable[[], None]


class Graphed:
    """Call a function of tensors, and on a GPU replay it as a CUDA graph from its second call of a kind on.

    Calls are of one kind if their inputs have the same shapes, strides, types and device, gradients and autocast are
    switched alike, and `state()` is the same. The first one of a kind runs as written, on a stream of its own: there
    kernels are compiled. The second is recorded; it and all further ones are replays, which give the same bits. If it
    cannot be recorded, calls of that kind run as written; `told` says how the last call was run, and why.

    What is recorded must wait for nothing on the host and take nothing from there that changes, but by `state`. A
    network says that of its `forward`, and a loss of itself, by an attribute `capturable`.

    Args:
        function: of tensors, to a tensor or a tuple of tensors and None.
        device: where it computes.
        state: what else a recorded call depends on, for example `modules_state` of a network.
        on: False runs every call as written.
        copy: results are copies; without, the next call of that kind overwrites them.
    """

    def __init__(
        self,
        function: Callable[..., Results],
        device: torch.device,
        *,
        state: Callable[[], Hashable] = tuple,
        on: bool = True,
        copy: bool = True,
    ) -> None:
        self.function, self.device, self.state, self.on, self.copy = function, device, state, on, copy
        self.told = ""
        self._seen: dict[Hashable, str] = {}  # kinds that were run once, and why one cannot be recorded, or ""
        self._graphs: collections.OrderedDict[Hashable, Graph] = collections.OrderedDict()
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, *inputs: Tensor) -> Results:
        if not self.on or not possible(self.device):
            self.told = "off"
            return self.function(*inputs)
        kind = (tuple(map(_layout, inputs)), _switches(self.device), self.state())
        if kind not in self._graphs:
            reason = self._seen.get(kind)
            if reason is None:
                self._seen[kind] = ""
                self.told = "run as written: the first of its kind"
                return self._beside(lambda: self.function(*inputs))
            graph = None if reason else self._record(kind, inputs)
            if graph is None:
                self.told = f"run as written: {self._seen[kind]}"
                return self.function(*inputs)
            self._graphs[kind] = graph
            while len(self._graphs) > KEPT:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(kind)
        graph = self._graphs[kind]
        for held, given in zip(graph.inputs, inputs):
            held.copy_(given)
        graph.replay()
        self.told = "replayed"
        return _copies(graph.results) if self.copy else graph.results

    def _record(self, kind: Hashable, inputs: tuple[Tensor, ...]) -> Graph | None:
        held = tuple(x.clone() for x in inputs)  # dense, with the strides of x
        try:
            with _uncached_casts():
                results, replay = record(lambda: self.function(*held), self.device, self._stream)
        except RuntimeError as error:  # what waits for the host, or not enough memory: a call as written may do
            self._seen[kind] = str(error).partition("\n")[0][:200]
            return None
        return Graph(held, results, replay)

    def _beside(self, call: Callable[[], Results]) -> Results:
        """On the stream of the recordings: backward passes go to the streams of their forward passes."""
        if self.device.type != "cuda":
            return call()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        here = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            results = call()
        here.wait_stream(self._stream)
        return results


def record(
    function: Callable[[], Results], device: torch.device, stream: "torch.cuda.Stream | None"
) -> tuple[Results, Callable[[], None]]:
    """Results of a function, which are there after a replay only, and the function that replays."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.stream(stream):  # also left where a recording breaks off
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                results = function()
        except RuntimeError:
            # a recording that breaks off leaves the generator as if it went on, and random numbers would be refused
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise
    return results, graph.replay


def modules_state(*modules: nn.Module) -> Hashable:
    """What a recorded call of modules depends on: where their tensors lie, and plain values among their attributes."""
    tensors = tuple(x.data_ptr() for m in modules for x in (*m.parameters(), *m.buffers()))
    plain = (bool, int, float, str)
    numbers = ((k, v) for m in modules for k, v in vars(m).items() if isinstance(v, plain) and not k.startswith("_"))
    return tensors, tuple(numbers)


def _layout(x: Tensor) -> Hashable:
    return tuple(x.shape), x.stride(), x.dtype, x.device


def _switches(device: torch.device) -> Hashable:
    cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cast


def _copies(results: Results) -> Results:
    if isinstance(results, Tensor):
        return results.clone()
    return tuple(None if x is None else x.clone() for x in results)


class _uncached_casts:
    """Autocast without its cache of cast weights, which are freed before the graph that would read them."""

    def __enter__(self) -> None:
        self.before = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch.set_autocast_cache_enabled(self.before)
