"""What the benches share: the repository, the machine they run on, and what a process has taken of it."""

import importlib.metadata
import importlib.util
import os
import platform
import resource
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def one_thread() -> dict[str, str]:
    """Environment of a process that computes on one thread."""
    return os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def peak_gib() -> float:
    """Largest resident memory of this program; Linux's ru_maxrss also counts what the parent held before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def hardware(device: str = "cpu") -> dict:
    """What the figures depend on."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    packages = {name: version(name) for name in ("torch", "triton", "monai")}
    gpu = {}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = {"gpu": properties.name, "gpu_gib": properties.total_memory / 2**30, "cuda": torch.version.cuda}
    return {"cpu": model, "cores": os.cpu_count(), "threads": 1, "python": platform.python_version()} | packages | gpu


def version(package: str) -> str | None:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else None
