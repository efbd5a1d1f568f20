"""Bytes, launches and memory of SACB-Net on CUDA, counted without a GPU: every operation of a run on fake tensors.

    python tests/bench/account.py pass                       # at 160x192x224
    python tests/bench/account.py step --size 80,96,80 --output counted.json

The operators are opened: their own torch code is counted, their Triton launches as one launch each, so that the table
says where the memory traffic comes from. Bytes of an operation are its tensors and results, each storage once; views
and allocations count nothing. What a kernel reads more than once, and what convolutions need besides, is not in it.

Predicted milliseconds: bytes at 2.8 TB/s; the convolutions as cuDNN did them on an H200 (results/gpu_h200.json), for
sizes that were not measured in proportion to their products.
"""

import collections
import contextlib
import importlib
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import fire
import torch
from machine import ROOT
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path[:0] = [str(ROOT), str(ROOT / "bundles" / "sacb_net")]
OPS = "box", "conv", "warp", "match", "sacb", "kmeans", "norm_act", "scale"
RATE = 2.8e12  # bytes a second
GOALS = {"pass": {"launches": 400, "gb": 25, "ms": 20}, "step": {"gb": 70, "ms": 60}}  # below these
FREE = {"empty", "detach", "new_empty", "empty_strided", "empty_like", "lift_fresh", "alias"}  # no launch
DIVISORS = {"": 1, "half": 2, "quarter": 4, "eighth": 8}  # in names of measured convolutions


class Count(TorchDispatchMode):
    """Launches and bytes by subject and operation; the most memory that was alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.subjects = ["other"]
        self.found: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
        self.convolutions: list[tuple[bool, int, int, tuple[int, ...]]] = []  # backward?, inputs, outputs, (B, I, J, K)
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        ins = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        for x in outs:
            self.keep(x)
        name, written = func.overloadpacket.__name__, func._schema.is_mutable
        held = {x.untyped_storage()._cdata for x in ins}
        views = outs and ins and all(x.untyped_storage()._cdata in held for x in outs)
        if name in FREE or not written and (views or not outs):
            return out
        self.note(name, ins, ins[:1] if written else outs)
        if name.startswith("convolution"):
            x, weight = ins[-2:] if name == "convolution_backward" else ins[:2]
            self.convolutions.append((name != "convolution", *weight.shape[1::-1], (len(x), *x.shape[2:])))
        return out

    def note(self, name: str, ins: list[torch.Tensor], outs: list[torch.Tensor] = ()) -> None:
        read = {(x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape)): nbytes(x) for x in ins}
        entry = self.found[self.subjects[-1], name]
        entry[0] += 1
        entry[1] += sum(read.values()) + sum(map(nbytes, outs))

    def keep(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.alive and isinstance(x, FakeTensor):
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)

    @contextlib.contextmanager
    def subject(self, name: str) -> Iterator[None]:
        self.subjects.append(name)
        try:
            yield
        finally:
            self.subjects.pop()


def nbytes(x: torch.Tensor) -> int:
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


class Kernel:
    """In the place of a Triton kernel: a launch is counted."""

    def __init__(self, name: str, kernel: object, count: Count) -> None:
        self.name, self.kernel, self.count = name, kernel, count

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: object, **options: object) -> None:
        self.count.note(f"triton {self.name}", [x for x in arguments if isinstance(x, torch.Tensor)])


def opened(op: object, count: Count) -> Callable:
    """A custom operator as a function that runs its own torch code, with its registered gradient."""
    body, back, setup = op._init_fn, op._backward_fn, op._setup_context_fn
    if back is None:
        return body

    class Opened(torch.autograd.Function):
        @staticmethod
        def forward(*inputs):
            return body(*inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.subject = count.subjects[-1]
            if setup:
                setup(ctx, inputs, output)

        @staticmethod
        def backward(ctx, *grads):
            with count.subject(ctx.subject):
                return back(ctx, *grads)

    return Opened.apply


def as_on_cuda(count: Count, kernel: type[Kernel] = Kernel, *, halves: bool = True) -> None:
    """Replace, for the rest of this process, kernels and operators; every layer is chosen as for CUDA tensors."""
    torch.cuda.device_of = lambda x: contextlib.nullcontext()
    for name in OPS:
        module = importlib.import_module(f"common.ops.{name}.kernel")
        for key, value in list(vars(module).items()):
            if key.endswith("_kernel"):
                setattr(module, key, kernel(f"{name}.{key}", value, count))
            elif hasattr(value, "op"):
                setattr(module, key, opened(value.op, count))
        sys.modules[f"common.ops.{name}"].choose = lambda *args, **options: "triton"
    from common import losses
    from sacb_net import network

    norm_act = sys.modules["common.ops.norm_act"]
    norm_act.conv_before_norm = lambda x, weight, bias, backend=None: norm_act.conv3d(
        x, weight + 0 * bias.view(-1, 1, 1, 1, 1) if torch.is_grad_enabled() else weight
    )
    for owner in (network, sys.modules["common.ops.sacb"]):
        owner.conv_before_norm = norm_act.conv_before_norm
    lean = sys.modules["common.ops.conv.lean"]
    lean.conv3d_cpu = lambda *given: (lean.HalfGradients.apply if halves else lean.conv3d_reference)(*given)
    for name in ("conv.lean", "sacb.kernel"):
        sys.modules[f"common.ops.{name}"].by_halves = lambda x: halves and x.dtype == torch.float32
    subjects = {
        network: ("norm_act", "halve", "double", "warp", "match", "compose"),
        sys.modules["common.ops.sacb"]: ("norm_act", "kmeans", "box_mean", "modulated_conv3d"),
        losses: ("lncc", "diffusion", "warp"),
    }
    for owner, names in subjects.items():
        for name in names:
            setattr(owner, name, told(getattr(owner, name), name, count))


def told(inner: Callable, name: str, count: Count) -> Callable:
    def run(*args, **options):
        with count.subject(name if count.subjects[-1] == "other" else count.subjects[-1]):
            return inner(*args, **options)

    return run


def run(count: Count, what: str, size: tuple[int, ...]) -> None:
    """A pass, or a step of training without the optimizer, on tensors that have no memory."""
    from common import losses
    from sacb_net import SACBNet

    learn = what == "step"
    net = SACBNet().train(learn)
    with FakeTensorMode(allow_non_fake_inputs=True):  # as CPU tensors: torch for CPUs has no fake CUDA memory
        parameters = {
            name: torch.empty_strided(p.shape, p.stride()).requires_grad_(learn) for name, p in net.named_parameters()
        }
        image = torch.empty(1, 2, *size)
        with count, torch.set_grad_enabled(learn):
            disp = torch.func.functional_call(net, parameters, (image,))
            if learn:
                loss = losses.RegistrationLoss()(disp, image)
                with count.subject("backward"):
                    loss.backward()


def predicted_ms(count: Count, size: tuple[int, ...], exact: bool) -> float:
    """See above."""
    rest = sum(n for (_, name), (_, n) in count.found.items() if not name.startswith("convolution"))
    rows = json.loads((Path(__file__).parent / "results" / "gpu_h200.json").read_text())["before"]["rows"]
    measured = {}
    for name, row in rows.items():
        words = name.split()
        if words[0] == "conv" and words[2:] == ["ndhwc", "tf32"]:
            inputs, _, outputs, *scale = words[1].split("_")
            backward = rows[name if exact else name.replace("tf32", "bf16")]["bwd"]
            measured[DIVISORS["".join(scale)], int(inputs), int(outputs)] = row["fwd"], backward
    full, total = (160, 192, 224), 1e3 * rest / RATE
    for backward, inputs, outputs, (batch, *grid) in count.convolutions:
        divisor = min(round(size[0] / grid[0]), 8)
        near = min(measured, key=lambda k: (k[0] != divisor, abs(k[1] * k[2] - inputs * outputs)))
        voxels = batch * grid[0] * grid[1] * grid[2] / (full[0] * full[1] * full[2] / near[0] ** 3)
        total += measured[near][backward] * voxels * inputs * outputs / (near[1] * near[2])
    return total


def summary(count: Count, what: str, size: tuple[int, ...], exact: bool) -> dict:
    found = {"launches": sum(n for n, _ in count.found.values()), "gb": sum(n for _, n in count.found.values()) / 1e9}
    found |= {"ms": predicted_ms(count, size, exact), "peak_mib": count.peak / 2**20}
    subjects: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for (subject, name), (launches, moved) in count.found.items():
        entry = subjects["convolutions" if name.startswith("convolution") else subject]
        entry[0] += launches
        entry[1] += moved / 1e9
    ordered = dict(sorted(subjects.items(), key=lambda item: -item[1][1]))
    return {"what": what, "size": size, "goals": GOALS[what]} | found | {"subjects": ordered}


def main(
    what: str = "pass",
    size: str | tuple[int, ...] = (160, 192, 224),
    exact: bool = False,
    output: str | None = None,
) -> None:
    """Count, print the table, and keep it as JSON.

    Args:
        what: "pass", or "step" for forward and backward pass with the loss.
        size: voxels.
        exact: gradients of convolutions in TF32, without the casts to bfloat16.
        output: file of JSON.
    """
    size = tuple(int(n) for n in (size.split(",") if isinstance(size, str) else size))
    count = Count()
    as_on_cuda(count, halves=not exact)
    run(count, what, size)
    found = summary(count, what, size, exact)
    goals = ", ".join(f"{name} below {limit}" for name, limit in GOALS[what].items())
    line = f"{found['launches']} launches, {found['gb']:.2f} GB, {found['ms']:.1f} ms predicted"
    print(f"{what} at {'x'.join(map(str, size))}: {line}, {found['peak_mib']:.0f} MiB (goals: {goals})")
    for name, (launches, gb) in found["subjects"].items():
        print(f"  {name:20s}{launches:6.0f} launches {gb:9.3f} GB {gb * 1e12 / RATE:8.3f} ms at 2.8 TB/s")
    print("heaviest:")
    for (subject, name), (launches, moved) in sorted(count.found.items(), key=lambda item: -item[1][1])[:30]:
        print(f"  {subject:20s}{name:44s}{launches:6d} launches {moved / 1e9:9.3f} GB")
    if output:
        Path(output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
