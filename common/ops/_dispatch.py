"""Which layer of an operator runs: one visible rule for all of them.

reference   plain torch, the formula; used while tracing, scripting or exporting, and when asked for.
lean        torch with slabs and recompute; the default on CPU, and on any device without a kernel.
triton      the operator's kernel.py; the default for CUDA tensors where that file and Triton exist. By name it also
            runs on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1 before the first use), for tests.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("reference", "lean", "triton")
KERNELS = {path.parent.name for path in Path(__file__).parent.glob("*/kernel.py")}
HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def on_plain_tensors(op: Callable) -> Callable:
    """Decorator of an operator's face: MONAI's MetaTensors come in, and the result leaves, as plain tensors, and there
    is no autocast inside, so that the operator computes in at least float32, as it says.

    The inputs may be half, as autocast left them; only what the operator itself does is kept from it.
    """

    @functools.wraps(op)
    def run(*args, **kwargs):
        args = [plain(value) for value in args]
        kwargs = {name: plain(value) for name, value in kwargs.items()}
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None or x.is_meta or not torch.is_autocast_enabled(x.device.type):  # meta knows no autocast
            return op(*args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return op(*args, **kwargs)

    return run


def plain(value: Any) -> Any:
    """A MetaTensor as a plain tensor, anything else as it is; new_empty(*size) and zeros_like refuse MetaTensors."""
    return value.as_tensor() if hasattr(value, "as_tensor") else value


def custom_op(name: str) -> Callable[[Callable], Callable]:
    """Decorator: `torch.library.custom_op`, of which no more than the function itself runs where only values are asked
    for: before its first call torch would load the whole of its compiler, two CPU-seconds.

    As an operator it is called where a gradient is, and wherever something else than real tensors goes in: while
    compiling or exporting, of meta and fake tensors.
    """

    def mark(function: Callable) -> Callable:
        op = torch.library.custom_op(name, function, mutates_args=())

        @functools.wraps(function)
        def run(*args: Any) -> Any:
            return function(*args) if _only_values(args) else op(*args)

        run.op, run.register_fake, run.register_autograd = op, op.register_fake, op.register_autograd
        return run

    return mark


def _only_values(args: tuple) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    tensors = [x for x in args if isinstance(x, Tensor)]
    if any(type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta for x in tensors):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def scripted_as(scripted: Callable) -> Callable:
    """Decorator of an operator's face: torch.jit.script compiles `scripted`, a function of the same name and
    arguments, in its place.

    A face checks its arguments and chooses a layer in Python that TorchScript cannot read. The two attributes are those
    of torch.jit.script_if_tracing, which would also script, and so lose, what is traced.
    """

    def mark(face: Callable) -> Callable:
        setattr(face, "__script_if_tracing_wrapper", True)
        setattr(face, "__original_fn", scripted)
        return face

    return mark


def why_not_triton(op: str, tensor: Tensor) -> str:
    """The reason why `op` cannot run its Triton kernel on `tensor`, or "" if it can."""
    if op not in KERNELS:
        return f"{op} has no Triton kernel in this version"
    if not HAS_TRITON:
        return "Triton is not installed"
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensor is on {tensor.device}, not on a CUDA device"
    if tensor.dtype not in KERNEL_DTYPES:
        return f"kernels take float32, float16 and bfloat16, the tensor is {tensor.dtype}"
    return ""


def choose(
    op: str, tensor: Tensor, backend: str | None, *, portable: str = "reference", name: str | None = None
) -> str:
    """Return the layer to run: "reference", "lean" or "triton".

    A backend asked for by name is obeyed or refused with the reason, never replaced.

    Args:
        op: folder name of the operator.
        tensor: an input, whose device decides.
        backend: a name of BACKENDS, or None for the rule above.
        portable: the layer that leaves no custom operator in an exported graph.
        name: of the public function, where it is not that of the folder.

    Raises:
        ValueError: unknown name. RuntimeError: the named backend cannot run, and why.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{name or op}() 'backend' must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "triton" and (reason := why_not_triton(op, tensor)):
        raise RuntimeError(f"{name or op}() cannot run backend 'triton': {reason}")
    if backend is not None:
        return backend
    if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_exporting():
        return portable
    return "triton" if tensor.is_cuda and not why_not_triton(op, tensor) else "lean"
