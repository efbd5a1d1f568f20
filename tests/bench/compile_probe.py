"""What the compiler makes of every Triton kernel that SACB-Net launches, for sm_90 and without a GPU.

    python tests/bench/compile_probe.py                 # a step of training at 160x192x224, and what has grown
    python tests/bench/compile_probe.py --write True    # keep the table as results/kernels_sm90.json

The step runs on fake tensors (account.py); each launch with other types or constants is compiled once. Registers are
those that the assembler reports, spills the instructions that write registers to memory or read them back. Neither may
grow; registers are compared with those of the same version of Triton only.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import fire
import torch
from account import Count, Kernel, as_on_cuda, run

FILE = Path(__file__).parent / "results" / "kernels_sm90.json"


class Compiled(Kernel):
    """Keeps the types and constants of each launch."""

    launches: dict[str, tuple] = {}

    def launch(self, *arguments: object, num_warps: int = 4, **options: object) -> None:
        from triton.runtime.jit import mangle_type

        super().launch(*arguments, **options)
        signature, constants, attributes = {}, {}, {}
        for n, (key, value) in enumerate((dict(zip(self.kernel.arg_names, arguments)) | options).items()):
            if key in options or value is None or isinstance(value, int) and value == 1:  # as at a real launch
                signature[key], constants[key] = "constexpr", value
                continue
            signature[key] = mangle_type(value)
            if isinstance(value, torch.Tensor) or isinstance(value, int) and value % 16 == 0:
                attributes[(n,)] = [["tt.divisibility", 16]]
        chosen = " ".join(f"{key}={value}" for key, value in constants.items() if key in options)
        types = " ".join(sorted({kind for kind in signature.values() if kind.startswith("*")}))
        apart = "".join("16"[(n,) in attributes] for n in range(len(signature)))  # divisible by 16, or not
        name = f"{self.name} {chosen} {types} {num_warps} warps {apart}"
        self.launches.setdefault(name, (self.kernel, signature, constants, attributes, num_warps))


def inspected(kernel: object, signature: dict, constants: dict, attributes: dict, warps: int) -> dict[str, int]:
    """Registers, spills, and bytes of shared memory of a kernel compiled for sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        spills = len(re.findall(r"\b(?:LDL|STL)\b", tool("nvdisasm", "-c", file.name)))
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    return {"registers": registers, "spills": spills, "shared": built.metadata.shared}


def tool(name: str, *words: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *words], capture_output=True, text=True, check=True).stdout


def grown(found: dict[str, dict], kept: dict, version: str) -> list[str]:
    """What is worse than in the file, in words."""
    worse = []
    for name, row in found.items():
        before = kept["kernels"].get(name)
        if row["spills"] > (before or {"spills": 0})["spills"]:
            worse.append(f"{name}: {row['spills']} instructions that spill")
        if before and version == kept["triton"] and row["registers"] > before["registers"]:
            worse.append(f"{name}: {row['registers']} registers, {before['registers']} before")
    return worse


def main(
    what: str = "step", size: str | tuple[int, ...] = (160, 192, 224), only: str = "", write: bool = False
) -> None:
    """Compile, print a line a kernel, and end with exit code 1 if one has grown.

    Args:
        what: "step", or "pass" for the forward kernels alone.
        size: voxels.
        only: kernels whose name begins so, as "warp".
        write: keep the table.
    """
    import triton

    size = tuple(int(n) for n in (size.split(",") if isinstance(size, str) else size))
    count = Count()
    as_on_cuda(count, Compiled, halves=False)
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    run(count, what, size)
    found = {}
    for name, launch in sorted(Compiled.launches.items()):
        if name.startswith(only):
            found[name] = inspected(*launch)
            print(f"{name}: {found[name]}", flush=True)
    if write:
        FILE.write_text(json.dumps({"triton": triton.__version__, "size": size, "kernels": found}, indent=1) + "\n")
    worse = grown(found, json.loads(FILE.read_text()), triton.__version__)
    spilled = sum(row["spills"] > 0 for row in found.values())
    print(f"{len(found)} kernels, {spilled} spill; {len(worse)} have grown", *worse, sep="\n")
    sys.exit(bool(worse))


if __name__ == "__main__":
    fire.Fire(main)
