"""Bytes, launches and memory of SACB-Net on CUDA, counted without a GPU: every ATen op of a run on fake tensors.

    python tests/bench/account.py forward|train [160,192,224]

The custom operators are opened (their own torch code is counted, their Triton launches as one launch each), so that the
table says where a step's memory traffic comes from. Bytes of an op = its tensor arguments + results, each storage once;
views and allocations count nothing. What a kernel reads more than once, and convolution workspaces, are not in it.
"""

import collections
import contextlib
import importlib
import sys
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
what = sys.argv[1] if len(sys.argv) > 1 else "forward"
size = tuple(map(int, (sys.argv[2] if len(sys.argv) > 2 else "160,192,224").split(",")))
sys.path[:0] = [str(ROOT), str(ROOT / "bundles" / "sacb_net")]
torch.cuda.device_of = lambda x: contextlib.nullcontext()
torch.cuda.is_current_stream_capturing = lambda: False

DEVICE = "cpu"  # with every layer chosen as on CUDA: torch for CPUs has no fake CUDA memory
OPS = "warp", "match", "sacb", "kmeans", "norm_act", "scale"
LABEL = ["other"]
TOTAL = collections.defaultdict(lambda: [0, 0])  # (label, op) -> launches, bytes
LIVE, PEAK = {}, [0, 0]
FREE = {"aten.empty", "aten.detach", "aten.new_empty", "aten.empty_strided", "aten.empty_like", "aten.lift_fresh", "aten.alias"}  # noqa: E501


def nbytes(x):
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def note(op, tensors, outs=()):
    seen, total = set(), 0
    for x in (*tensors, *outs):
        key = (x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), x is not None and id(x) in map(id, outs))
        if key not in seen:
            seen.add(key)
            total += nbytes(x)
    entry = TOTAL[(LABEL[-1], op)]
    entry[0] += 1
    entry[1] += total


class Count(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        ins = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        for x in outs:
            track(x)
        name = str(func).rsplit(".", 1)[0]
        views = outs and ins and all(any(o.untyped_storage()._cdata == i.untyped_storage()._cdata for i in ins) for o in outs)  # noqa: E501
        mutable = func._schema.is_mutable
        if name in FREE or (views and not mutable) or not outs and not mutable:
            return out
        if mutable:  # read and written
            note(name, ins, [x for x in ins[:1]])
        else:
            note(name, ins, outs)
        return out


def track(x):
    import weakref

    storage = x.untyped_storage()
    key = storage._cdata
    if key in LIVE or not isinstance(x, torch._subclasses.FakeTensor):
        return
    LIVE[key] = storage.nbytes()
    PEAK[1] += storage.nbytes()
    PEAK[0] = max(PEAK[0], PEAK[1])
    weakref.finalize(storage, forget, key)


def forget(key):
    PEAK[1] -= LIVE.pop(key, 0)


class Kernel:
    def __init__(self, name):
        self.name = name

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            note("triton." + self.name, [x for x in arguments if isinstance(x, torch.Tensor)])

        return launch


def open_op(op):
    """A function that runs the operator's own torch code, with its registered gradient."""
    body, back, setup = op._init_fn, op._backward_fn, op._setup_context_fn
    if back is None:
        return body

    class Opened(torch.autograd.Function):
        @staticmethod
        def forward(*inputs):
            with labelled(LABEL[-1]):
                return body(*inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.label = LABEL[-1]
            if setup:
                setup(ctx, inputs, output)

        @staticmethod
        def backward(ctx, *grads):
            with labelled(ctx.label):
                return back(ctx, *grads)

    return Opened.apply


@contextlib.contextmanager
def labelled(name):
    LABEL.append(name)
    try:
        yield
    finally:
        LABEL.pop()


def wrap(owner, name, label):
    inner = getattr(owner, name)

    def run(*args, **kwargs):
        with labelled(label if LABEL[-1] == "other" or label.startswith("=") else LABEL[-1] + "/" + label):
            return inner(*args, **kwargs)

    setattr(owner, name, run)


def main():
    modules = {name: importlib.import_module(f"common.ops.{name}.kernel") for name in OPS}
    for module in modules.values():
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                setattr(module, name, Kernel(name))
            elif isinstance(value, torch._library.custom_ops.CustomOpDef):
                setattr(module, name, open_op(value))
    from common import losses
    from sacb_net import network

    for name in OPS:
        sys.modules[f"common.ops.{name}"].choose = lambda *args, **kwargs: "triton"
    from common.ops import sacb

    for owner, name, label in ((network, "norm_act", "norm_act"), (network, "halve", "halve"), (network, "double", "double"),  # noqa: E501
                               (network, "warp", "warp"), (network, "match", "match"), (network, "compose", "compose"),
                               (sacb, "norm_act", "norm_act"), (sacb, "kmeans", "kmeans"), (sacb, "box_mean", "box_mean"),  # noqa: E501
                               (sacb, "modulated_conv3d", "modulated_conv3d"), (losses, "lncc", "lncc"), (losses, "diffusion", "diffusion"),  # noqa: E501
                               (losses, "warp", "loss warp")):
        wrap(owner, name, label)
    net = network.SACBNet().train(what == "train")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        params = {
            k: torch.empty_strided(p.shape, p.stride(), device=DEVICE).requires_grad_(what == "train") for k, p in net.named_parameters()  # noqa: E501
        }
        image = torch.empty(1, 2, *size, device=DEVICE)
        base = sum(nbytes(p) for p in params.values())
        with Count(), torch.set_grad_enabled(what == "train"):
            disp = torch.func.functional_call(net, params, (image,))
            forward = PEAK[0]
            if what == "train":
                loss = losses.RegistrationLoss()(disp, image)
                LABEL.append("backward")
                loss.backward()
    groups = collections.defaultdict(lambda: [0, 0])
    for (label, op), (n, size_) in TOTAL.items():
        head = label.split("/")[-1]
        if op.startswith("aten.convolution"):
            head = "conv3d" + ("" if label == "other" else " (" + label + ")")
        groups[head][0] += n
        groups[head][1] += size_
    print(f"{what} {size}: {sum(n for n, _ in TOTAL.values())} launches, {sum(b for _, b in TOTAL.values()) / 1e9:.2f} GB; "  # noqa: E501
          f"peak {PEAK[0] / 2**20:.0f} MiB beyond parameters {base / 2**20:.1f}, of which forward {forward / 2**20:.0f}")  # noqa: E501
    for name, (n, b) in sorted(groups.items(), key=lambda x: -x[1][1]):
        print(f"  {name:34s}{n:7d} launches {b / 1e9:9.3f} GB  {b / 2.8e12 * 1e3:8.3f} ms at 2.8 TB/s")
    print("-- largest single ops")
    for (label, op), (n, b) in sorted(TOTAL.items(), key=lambda x: -x[1][1])[:45]:
        print(f"  {label[:30]:32s}{op:44s}{n:6d} {b / 1e9:9.3f} GB")


main()
