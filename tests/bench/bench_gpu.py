"""What a GPU does with SACB-Net, in one process and a given time: pass, step, operators, convolutions, kernels.

    python tests/bench/bench_gpu.py --seconds 150                              # everything, most important first
    python tests/bench/bench_gpu.py --parts network,profile --size 80,96,80 --output new.json
    python tests/bench/bench_gpu.py --device cpu --size 32,32,32 --seconds 60   # a rehearsal

A row holds the median milliseconds on the device (CUDA events, after warm-up), until the host had enqueued everything
("host_ms"), of the first call with its compilation ("first_ms"), and MiB above the inputs ("mib") and in all. The file
is written after every row, so that a time limit loses nothing.

network        pass and training step, as they are and as CUDA graphs, with the largest difference
convolutions   each 3x3x3 convolution of the network: cuDNN's, with our gradients, ours; how far apart they are
small          the same as network at 80x96x80; 50 steps of refinement without and with a graph; a made-up pair drawn
half           pass and step under bfloat16 autocast, at both sizes
methods        a full-size SAMConvex
operators      every operator at the sizes of the network's scales, forward and backward
profile        kernels of a pass and of a step, the heaviest first
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fire
import torch
import torch.nn.functional as F
from machine import ROOT, hardware
from torch import Tensor

sys.path[:0] = [str(ROOT), *(str(path) for path in sorted((ROOT / "bundles").iterdir()))]
from common.graphs import Graphed  # noqa: E402
from common.losses import RegistrationLoss  # noqa: E402
from common.ops import conv3d, kmeans, match, modulated_conv3d, norm_act, warp  # noqa: E402
from common.refine import refine  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SMALL = (80, 96, 80)  # a brain at 2 mm
WIDTHS = {1: 8, 2: 16, 4: 32, 8: 64}  # divisor of the size: channels
CONVOLUTIONS = (  # divisor of the size, inputs, outputs
    (1, 1, 4), (1, 4, 8), (1, 8, 8), (1, 16, 8), (1, 8, 3), (2, 8, 16), (2, 16, 16), (4, 32, 32), (8, 64, 64),
)  # fmt: skip


class Bench:
    """Measures calls, and keeps the rows in a file."""

    def __init__(self, device: str, size: tuple[int, ...], seconds: float, output: Path) -> None:
        self.device, self.size, self.output = torch.device(device), size, output
        self.end = time.monotonic() + seconds
        commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        self.found = {"hardware": hardware(device), "commit": commit.stdout.strip() or None, "size": size, "rows": {}}

    def row(self, name: str, make: Callable[[], object]) -> None:
        """Keep what `make` returns under `name`, or why there is nothing."""
        try:
            value = make() if time.monotonic() < self.end else "no time left"
        except (RuntimeError, ValueError, NotImplementedError) as error:  # the other rows do not suffer
            value = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        self.found["rows"][name] = value
        self.output.write_text(json.dumps(self.found, indent=1) + "\n")
        print(f"{name}: {json.dumps(value)[:160]}", flush=True)

    def once(self, call: Callable[[], object]) -> tuple[float, float]:
        begin = time.perf_counter()
        if self.device.type == "cpu":
            call()
            return (1000 * (time.perf_counter() - begin),) * 2
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        host = 1000 * (time.perf_counter() - begin)
        torch.cuda.synchronize()
        return start.elapsed_time(end), host

    def timed(self, call: Callable[[], object], repeats: int = 5) -> dict:
        first = self.once(call)[0]
        self.once(call)
        row, before = {}, 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        runs = [self.once(call) for _ in range(repeats)]
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            row = {"mib": round((peak - before) / 2**20), "mib_in_all": round(peak / 2**20)}
        device, host = (statistics.median(times) for times in zip(*runs))
        return {"ms": round(device, 3), "host_ms": round(host, 3), "first_ms": round(first, 1)} | row

    def volume(self, channels: int, divisor: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random features at a scale of the network, channels last."""
        x = torch.randn(batch, channels, *(n // divisor for n in self.size), device=self.device, dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last_3d)

    def image(self, size: tuple[int, ...] | None = None) -> Tensor:
        coarse = torch.randn(1, 2, *(n // 8 for n in self.size), device=self.device)
        smooth = F.interpolate(coarse, size=size or self.size, mode="trilinear")
        return (smooth + 0.1 * torch.randn_like(smooth)).sigmoid()


def sacb_net(bench: Bench) -> torch.nn.Module:
    from sacb_net import SACBNet

    net = SACBNet()
    net.load_state_dict(torch.load(ROOT / "bundles/sacb_net/models/model.pt", weights_only=True))
    return net.to(bench.device)


def forward_of(bench: Bench, net: torch.nn.Module, image: Tensor, half: bool = False) -> Callable[[], Tensor]:
    @torch.no_grad()
    def run() -> Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=half):
            return net(image)

    return run


def step_of(
    bench: Bench, net: torch.nn.Module, image: Tensor, half: bool = False, graph: bool = False
) -> Callable[[], Tensor]:
    """A step of training that gives the loss; with `graph` as `GraphedStep` of common.train.engines does it."""
    learned = list(net.parameters())
    loss, optimizer = RegistrationLoss(), torch.optim.Adam(learned, lr=1e-4)

    def forward_and_backward() -> tuple[Tensor, ...]:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=half):
            disp = net(image)
        value = loss(disp.float(), image)
        return value.detach(), *torch.autograd.grad(value, learned)

    call = Graphed(forward_and_backward, bench.device, on=graph, copy=False)

    def run() -> Tensor:
        value, *slopes = call()
        for parameter, slope in zip(learned, slopes):
            parameter.grad = slope
        optimizer.step()
        return value

    return run


def as_graph(bench: Bench, run: Callable[[], Tensor]) -> dict:
    """Replays of a pass, and how far the result is from that of the pass as it is."""
    graphed = Graphed(run, bench.device, copy=False)
    row = bench.timed(lambda: graphed())
    return row | {"told": graphed.told, "largest_difference": float((graphed() - run()).abs().max())}


def pass_and_step(bench: Bench, size: tuple[int, ...], name: str = "") -> None:
    net, image = sacb_net(bench), bench.image(size)
    forward = forward_of(bench, net, image)
    bench.row(f"pass{name}", lambda: bench.timed(forward))
    bench.row(f"step{name}", lambda: bench.timed(step_of(bench, net, image)))
    bench.row(f"pass as a CUDA graph{name}", lambda: as_graph(bench, forward))
    bench.row(f"step as a CUDA graph{name}", lambda: bench.timed(step_of(bench, net, image, graph=True)))


def network(bench: Bench) -> None:
    pass_and_step(bench, bench.size)


def small(bench: Bench) -> None:
    from common.train.synthesis import ShapePairs

    size, name = (SMALL, " 80x96x80") if bench.device.type == "cuda" else ((32, 32, 32), " 32x32x32")
    pass_and_step(bench, size, name)
    net, pair = sacb_net(bench), bench.image(size)
    run = forward_of(bench, net, pair)
    for how, graphs in (("", False), (", as a CUDA graph", True)):
        steps = lambda graphs=graphs: refine(run(), pair, 50, progress=False, graphs=graphs)  # noqa: E731
        bench.row(f"pass and 50 steps{how}{name}", lambda steps=steps: bench.timed(steps, 3))
    numbers = iter(range(1000))
    drawn = ShapePairs(1000, size, device=bench.device)
    bench.row(f"made-up pair{name}", lambda: bench.timed(lambda: drawn[next(numbers)], 30))


def half(bench: Bench) -> None:
    net = sacb_net(bench)
    for name, size in (("", bench.size), (" 80x96x80", SMALL)):
        image = bench.image(size)
        bench.row(f"pass bfloat16{name}", lambda: bench.timed(forward_of(bench, net, image, True)))
        bench.row(f"step bfloat16{name}", lambda: bench.timed(step_of(bench, net, image, True)))


def methods(bench: Bench) -> None:
    from samconvex import SAMConvex

    weights = torch.load(ROOT / "bundles/samconvex/models/model.pt", weights_only=True)
    size = (192, 160, 256) if bench.device.type == "cuda" else (48, 48, 48)
    for features in ("sam", "mind"):
        sam = SAMConvex(features=features)
        sam.load_state_dict(weights, strict=features == "sam")
        run = forward_of(bench, sam.to(bench.device), bench.image(size))
        bench.row(f"samconvex {features} {'x'.join(map(str, size))}", lambda: bench.timed(run, 3))


def convolutions(bench: Bench) -> None:
    for divisor, inputs, outputs in CONVOLUTIONS:
        for dtype in (torch.float32, torch.bfloat16):

            def row() -> dict:
                x = bench.volume(inputs, divisor, dtype=dtype).requires_grad_()
                weight = torch.randn(outputs, inputs, 3, 3, 3, device=bench.device, dtype=dtype) / (27 * inputs) ** 0.5
                weight = weight.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
                grad = bench.volume(outputs, divisor, dtype=dtype)
                table, results = {}, {}
                layers = ("reference", "lean", "triton") if bench.device.type == "cuda" else ("reference", "lean")
                for layer in layers:
                    with torch.no_grad():
                        table[f"{layer} pass"] = bench.timed(lambda: conv3d(x, weight, backend=layer))["ms"]
                    y = conv3d(x, weight, backend=layer)
                    for name, leaf in (("input", x), ("weight", weight)):
                        pull = lambda: torch.autograd.grad(y, leaf, grad, retain_graph=True)[0]  # noqa: E731
                        table[f"{layer} gradient of {name}"] = bench.timed(pull)["ms"]
                        results[layer, name] = pull().double()
                    results[layer, "pass"] = y.detach().double()
                for layer, name in ((layer, name) for layer in layers[1:] for name in ("pass", "input", "weight")):
                    first, second = results["reference", name], results[layer, name]
                    table[f"{layer} difference of {name}"] = float((first - second).norm() / first.norm())
                return table

            bench.row(f"conv {inputs} to {outputs}, 1/{divisor}, {str(dtype)[6:]}", row)


def operators(bench: Bench) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for divisor, channels in WIDTHS.items():
            for name, (call, inputs) in cases(bench, divisor, channels, dtype).items():

                def row(call: Callable = call, inputs: list[Tensor] = inputs) -> dict:
                    with torch.no_grad():
                        table = {"forward": bench.timed(lambda: call(*inputs))}
                    if name == "kmeans":
                        return table
                    leaves = [x.detach().requires_grad_() for x in inputs]
                    out = call(*leaves)
                    grad = torch.randn_like(out)
                    pull = lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)  # noqa: E731
                    return table | {"backward": bench.timed(pull)}

                bench.row(f"{name}, 1/{divisor}, {str(dtype)[6:]}", row)


def cases(bench: Bench, divisor: int, channels: int, dtype: torch.dtype) -> dict[str, tuple[Callable, list[Tensor]]]:
    """Operators at a scale of the network, and their inputs."""
    size = [n // divisor for n in bench.size]
    disp = F.interpolate(2 * torch.randn(1, 3, 5, 5, 5, device=bench.device), size=size, mode="trilinear")
    disp = disp.contiguous(memory_format=torch.channels_last_3d)
    both, one = bench.volume(channels, divisor, 2, dtype), bench.volume(channels, divisor, dtype=dtype)
    found = {"warp": (lambda x, d: warp(x, d, padding="zeros"), [one, disp]), "norm_act": (norm_act, [both])}
    if divisor == 1:
        return found
    labels = torch.randint(7, (2, *(max(n // 8, 1) for n in size)), device=bench.device)
    labels = F.interpolate(labels[:, None].float(), size=size)[:, 0].long()
    taps = torch.randn(channels, channels, 3, 3, 3, device=bench.device) / (27 * channels) ** 0.5
    table = [both, taps, torch.randn(2, 7, channels, device=bench.device), torch.rand(2, 7, 27, device=bench.device)]
    found["match"] = match, [0.2 * one, 0.2 * bench.volume(channels, divisor, dtype=dtype)]
    found["modulated_conv3d"] = lambda *given: modulated_conv3d(*given, labels), table
    if dtype == torch.float32:
        points = both.permute(0, 2, 3, 4, 1).reshape(2, -1, channels)
        found["kmeans"] = lambda p: kmeans(p, 7, 20), [points]
    return found


def profile(bench: Bench) -> None:
    if bench.device.type == "cpu":
        return
    net, image = sacb_net(bench), bench.image()
    for name, run in (("pass", forward_of(bench, net, image)), ("step", step_of(bench, net, image))):
        run()
        bench.row(f"kernels of a {name}", lambda: kernels(run))


def kernels(run: Callable[[], object]) -> dict:
    """How many, their time, and of each name time in us and launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    table: dict[str, list] = {}
    for event in seen.events():
        if str(event.device_type).endswith("CUDA"):
            entry = table.setdefault(event.name[:140], [0.0, 0])
            entry[0] += event.time_range.elapsed_us()
            entry[1] += 1
    heaviest = sorted(((round(us), count, name) for name, (us, count) in table.items()), reverse=True)
    total, launches = sum(row[0] for row in heaviest), sum(row[1] for row in heaviest)
    return {"ms": total / 1000, "launches": launches, "heaviest": heaviest[:60]}


PARTS = {call.__name__: call for call in (network, convolutions, small, half, methods, operators, profile)}


def main(
    seconds: float = 150,
    parts: str | tuple[str, ...] = tuple(PARTS),
    size: str | tuple[int, ...] = (160, 192, 224),
    device: str | None = None,
    output: str | None = None,
) -> None:
    """Measure, print a line a row and keep all in a JSON file.

    Args:
        seconds: after which no further row begins.
        parts: out of network, convolutions, small, half, methods, operators, profile.
        size: voxels of the full-size scans.
        device: by default "cuda".
        output: by default results/gpu.json beside this file.
    """
    names = parts.split(",") if isinstance(parts, str) else parts
    size = tuple(int(n) for n in (size.split(",") if isinstance(size, str) else size))
    torch.manual_seed(0)
    bench = Bench(device or "cuda", size, seconds, Path(output or RESULTS / "gpu.json"))
    for name in names:
        try:
            PARTS[name](bench)
        except torch.cuda.OutOfMemoryError as error:
            bench.row(name, lambda error=error: str(error)[:200])


if __name__ == "__main__":
    fire.Fire(main)
