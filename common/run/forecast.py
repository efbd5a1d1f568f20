"""Time and memory of a registration before it is run, and what to do with a pair that will not fit.

Networks and refinement are convolutional: time and memory grow in proportion to the voxels. A bundle's inference.json
says what a voxel costs: bytes, and time in units of a convolution that this machine is timed with, in a twentieth of a
second. A network that says nothing is run on a crop of the pair. What comes before, loading and alignment, is known by
then; what comes after depends on the voxels of the fixed scan.
"""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import InputError
from common.fields import resize_disp
from common.run.machine import kept_memory

SIDE = 64  # of the crop that is measured; below this, sizes that do not depend on the voxels dominate
PROBE = 4  # steps of the refinement that are timed: of one alone, any other job on the machine is the larger part
POLICIES = ("stop", "tile", "coarsen")
HEAP = 1.5  # a process's memory over its tensors': 0.9 to 1.8 on CPU by tests/bench/bench_forecast.py
MARGIN = 0.8  # share of the free memory that may be planned for
OVERLAP = 0.25  # of neighbouring tiles
GIB = 2**30
Run = Callable[[Tensor], Tensor]  # (B, C, I, J, K) -> (B, 3, I, J, K) voxels


class Cost(NamedTuple):
    """Of one voxel, unless a function says otherwise."""

    seconds: float
    bytes: float


class Work(NamedTuple):
    """Of one voxel: time in `unit_seconds`, and bytes of tensors alive at once."""

    units: float
    bytes: float


# Of a step of the refinement, by what it compares; made by tests/bench/bench_forecast.py calibrate.
STEP = {"lncc": Work(0.62, 184.0), "mind": Work(1.37, 132.0), "auto": Work(1.37, 184.0)}
UNIT_SIDE, UNIT_CHANNELS = 40, 8  # of the convolution that is the unit

# Of warping, measuring, drawing and writing, without labels, a voxel of the fixed scan; always on the CPU. Held against
# whole runs by tests/bench/bench_forecast.py pairs.
DELIVERY = Cost(0.4e-6, 100.0)


@functools.cache
def unit_seconds(device: torch.device) -> float:
    """Seconds a voxel of a 3x3x3 convolution of 8 channels to 8 on this device, the best of five of 40^3 voxels."""
    x = torch.zeros(1, UNIT_CHANNELS, *[UNIT_SIDE] * 3, device=device)
    weight = torch.zeros(UNIT_CHANNELS, UNIT_CHANNELS, 3, 3, 3, device=device)
    seconds = []
    with torch.inference_mode():
        for _ in range(6):  # the first one pays for what is set up once
            started = time.perf_counter()
            F.conv3d(x, weight, padding=1)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    return min(seconds[1:]) / UNIT_SIDE**3


def known_cost(network: Work, device: torch.device, *, passes: int = 1, steps: int = 0, similarity: str = "") -> Cost:
    """Cost of a voxel of `passes` of a network and `steps` of the refinement, from what each is known to cost.

    Raises:
        KeyError: nothing is known of a refinement by that similarity.
    """
    step = STEP[similarity] if steps else Work(0.0, 0.0)
    units = passes * network.units + steps * step.units
    heap = 1.0 if device.type == "cuda" else HEAP
    return Cost(units * unit_seconds(device), heap * max(network.bytes, step.bytes))


def measure_cost(run: Run, image: Tensor, *, steps: int = 0, run_steps: Callable[[int], Run] | None = None) -> Cost:
    """Cost of a voxel, on the middle of `image` (B, C, I, J, K), SIDE voxels wide; all of a smaller image.

    Args:
        run: the registration, without refinement.
        steps: of the refinement to come; its cost is taken from PROBE steps and scaled.
        run_steps: gives the registration with so many steps.
    """
    box = [slice(max((n - SIDE) // 2, 0), max((n - SIDE) // 2, 0) + SIDE) for n in image.shape[2:]]
    crop = image[(..., *box)]
    (run_steps(1) if steps else run)(crop[..., :32, :32, :32])  # the first call pays for what is set up once
    seconds, size = _timed(lambda: run(crop), image.device)
    if steps:
        some = min(steps, PROBE)
        with_some, size = _timed(lambda: run_steps(some)(crop), image.device)
        seconds += steps / some * max(with_some - seconds, 0.0)
    voxels = crop[0, 0].numel()
    return Cost(seconds / voxels, size / voxels)


def _timed(work: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Seconds, and bytes beyond those before: on a GPU of tensors alive at once, on CPU HEAP times that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before, started = torch.cuda.memory_allocated(device), time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        return time.perf_counter() - started, torch.cuda.max_memory_allocated(device) - before
    seconds = min(_seconds(work), _seconds(work))
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would write to stderr
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return seconds, int(HEAP * most)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def free_memory(device: torch.device) -> int | None:
    """Bytes that may still be used: of the GPU, or of the machine within its container; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    known = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        known.append(int(fields["MemAvailable"].split()[0]) * 1024 + kept_memory())
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if Path(limit).exists() and Path(limit).read_text().strip().isdigit():
            known.append(int(Path(limit).read_text()) - int(Path(used).read_text()) + kept_memory())
    return min(known) if known else None


def peak_memory(device: torch.device) -> int | None:
    """Largest number of bytes that this process has had so far, on the GPU or in all; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if os.uname().sysname == "Darwin" else used * 1024


def resident_memory() -> int | None:
    """Bytes that this process has at the moment; its peak where the system does not say."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory(torch.device("cpu"))


def whole_pair(network: Cost, device: torch.device, scan_voxels: int, seconds: float) -> Cost:
    """A pair from the first file read to the last one written, all of its voxels.

    Args:
        network: of network and refinement, all voxels.
        device: of the network; its memory counts here if it is the CPU.
        scan_voxels: of the fixed scan as it is on disk.
        seconds: that the pair has taken so far.

    Returns:
        Seconds, and peak bytes of the process's own memory.
    """
    now, peak = max((resident_memory() or 0) - kept_memory(), 0), peak_memory(torch.device("cpu")) or 0
    working = network.bytes if device.type == "cpu" else 0.0
    memory = max(peak, now + working, now + DELIVERY.bytes * scan_voxels)
    return Cost(seconds + network.seconds + DELIVERY.seconds * scan_voxels, memory)


def plan(
    size: tuple[int, int, int], cost: Cost, limit: float | None, policy: str, *, divisor: int = 16
) -> tuple[str, tuple[int, int, int]]:
    """How to register a grid within `limit` bytes.

    Returns:
        ("whole", size), ("tile", size of a tile) or ("coarsen", size of the coarser grid).

    Raises:
        InputError: it does not fit and the policy is "stop", or not even the smallest tile or grid fits.
    """
    voxels = size[0] * size[1] * size[2]
    if limit is None or voxels * cost.bytes <= limit:
        return "whole", size
    need = f"{voxels * cost.bytes / GIB:.1f} GiB are needed for {' x '.join(map(str, size))} voxels"
    need += f" and {limit / GIB:.1f} GiB may be used"
    if policy == "stop":
        raise InputError(
            f"--too_large stop: {need}; choose --too_large tile or coarsen, a larger --spacing or --memory"
        )
    allowed = limit / cost.bytes
    smaller = list(size)
    while smaller[0] * smaller[1] * smaller[2] > allowed:
        longest = max(range(3), key=lambda axis: smaller[axis] / (1 if policy == "tile" else size[axis]))
        smaller[longest] = (-(-smaller[longest] // divisor) - 1) * divisor
        if min(smaller) < 2 * divisor:
            raise InputError(f"--too_large {policy}: {need}; not even {2 * divisor} voxels a side would fit")
    return policy, tuple(smaller)


def run_planned(
    run: Run, image: Tensor, how: str, size: tuple[int, int, int], *, resize: Callable[..., Tensor] = resize_disp
) -> Tensor:
    """Displacement (B, 3, I, J, K) of `image` by a plan, or what else `run` gives and `resize` brings to another size.

    Tiles overlap by OVERLAP and are blended by a Gaussian window (MONAI's sliding window): a displacement that reaches
    beyond a tile cannot be found. The coarser grid loses detail below its voxels.
    """
    if how == "whole":
        return run(image)
    from monai.inferers import sliding_window_inference
    from monai.networks.layers import GaussianFilter

    if how == "tile":
        return sliding_window_inference(image, size, 1, run, overlap=OVERLAP, mode="gaussian")
    ratios = [old / new for old, new in zip(image.shape[2:], size)]
    smooth = GaussianFilter(3, [0.4 * max(ratio**2 - 1, 1e-6) ** 0.5 for ratio in ratios]).to(image.device)
    coarse = F.interpolate(smooth(image), size=size, mode="trilinear", align_corners=True)
    return resize(run(coarse), tuple(image.shape[2:]))
