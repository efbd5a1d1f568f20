"""Every Triton kernel compiles to a cubin for sm_80 and sm_90 on any machine; no GPU is needed for that.

The interpreter of the other tests runs kernels as Python and lets pass what the compiler refuses: types, shapes, an
axis of one voxel, which Triton turns into a constant. Run as a script with a case and a target, this file launches
every operator with the kernels replaced by a compiler of the arguments they get, and prints a line for each; the tests
start it with the interpreter switched off.
"""

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes of shared memory that a program may have at most
CASES = {"odd": (80, 90), "half": (90,), "ones": (80,), "wide": (80,)}  # targets; a compile takes one to ten seconds


def entries() -> list[tuple[str, str]]:
    """(operator, kernel) of every function in a kernel.py that is launched, read from the source: none is forgotten."""
    found = []
    for path in sorted((ROOT / "common" / "ops").glob("*/kernel.py")):
        names = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        found += [(path.parent.name, name) for name in names if name.endswith("_kernel")]
    return found


def test_finds_kernels() -> None:
    names = {name for _, name in entries()}
    assert {"match_fwd_kernel", "warp_bwd_kernel", "modulated_conv3d_weight_kernel", "assign_kernel"} <= names


@pytest.mark.slow
@pytest.mark.parametrize(("case", "target"), [(case, target) for case, targets in CASES.items() for target in targets])
def test_compiles(case: str, target: int, tmp_path: Path) -> None:
    """A process for each case, which has then all its kernels: parallel workers share nothing that one makes twice."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    line = [sys.executable, __file__, case, str(target)]
    run = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = dict(line.split(": ", 1) for line in run.stdout.splitlines())
    # only in this operator the tiles grow with the square of the channels
    expected = {f"{op}.{kernel}" for op, kernel in entries() if op == "sacb" or case != "wide"}
    assert {name.rpartition(" ")[0] for name in found} == expected, "no operator launched one of them"
    for name, text in found.items():
        assert text.isdigit(), f"{name}: {text}"
        assert int(text) <= SHARED[target], f"{name} needs {text} bytes of shared memory"


def launches(case: str) -> Iterator[Callable[[], object]]:
    """Every operator, forward and backward; its constants differ from case to case, so that each of them occurs."""
    from common.ops.box.kernel import box_sum_triton
    from common.ops.conv.kernel import conv3d_triton
    from common.ops.cost_volume.kernel import cost_volume_triton
    from common.ops.kmeans.kernel import kmeans_triton
    from common.ops.match.kernel import match_triton
    from common.ops.norm_act.kernel import norm_act_triton
    from common.ops.sacb.kernel import modulated_conv3d_triton
    from common.ops.scale.kernel import box_mean_triton, double_triton, halve_triton
    from common.ops.warp.kernel import warp_triton

    batch, *size = (1, 1, 1, 1) if case == "ones" else (2, 5, 6, 7)
    channels, out, clusters = {"odd": (5, 3, 4), "half": (16, 24, 7), "ones": (1, 1, 1), "wide": (96, 160, 7)}[case]
    dtype = torch.bfloat16 if case == "half" else torch.float32
    similarity, padding = ("dot", "zeros") if case == "odd" else ("ssd", "border")
    torch.backends.cudnn.conv.fp32_precision = "tf32" if case in ("half", "ones") else "ieee"

    def features(number: int = channels) -> Tensor:
        return torch.zeros(batch, number, *size, dtype=dtype, requires_grad=True)

    def modulated_conv3d() -> None:
        weight, bias = torch.zeros(out, channels, 3, 3, 3), torch.zeros(batch, clusters, out)
        parameters = [x.requires_grad_() for x in (weight, bias, torch.zeros(batch, clusters, 27))]
        labels = torch.zeros(batch, *size, dtype=torch.int64)
        modulated_conv3d_triton(features(), *parameters, labels).sum().backward()

    yield modulated_conv3d
    if case == "wide":
        return
    taps = torch.zeros(out, channels, 3, 3, 3, dtype=dtype, requires_grad=True)
    yield lambda: conv3d_triton(features(), taps, None).sum().backward()
    yield lambda: box_sum_triton(features(), 3).sum().backward()
    yield lambda: match_triton(features(), features(), 1).sum().backward()
    yield lambda: warp_triton(features(), features(3), "linear", padding).sum().backward()
    yield lambda: warp_triton(features(), features(3).detach(), "nearest", padding)
    for disp in (None, features(3).detach()):
        pair = features().detach(), features().detach()
        yield lambda: cost_volume_triton(*pair, 1, disp, similarity, padding)
    points = torch.zeros(batch, size[0] * size[1] * size[2], channels)
    yield lambda: kmeans_triton(points, clusters, 2, None, 3)
    yield lambda: kmeans_triton(points, clusters, 1, points[:, :1].expand(-1, clusters, -1), 1)
    even = torch.zeros(batch, channels, *(2 * n for n in size), dtype=dtype, requires_grad=True)
    yield lambda: halve_triton(even).sum().backward()
    yield lambda: double_triton(features(3)).sum().backward()
    yield lambda: box_mean_triton(features().detach())
    yield lambda: norm_act_triton(features(), 0.1, 1e-5).sum().backward()


class Launcher:
    """Stands in for a kernel: compiles it for the arguments of a launch and says how it went."""

    def __init__(self, name: str, kernel: object, target: int) -> None:
        self.name, self.kernel, self.target, self.count = name, kernel, target, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: object, num_warps: int = 4, **options: object) -> None:
        from triton.runtime.jit import mangle_type

        signature, constants = {}, {}
        for key, value in (dict(zip(self.kernel.arg_names, arguments)) | options).items():
            if key in options or value is None or isinstance(value, int) and value == 1:  # as at a real launch
                signature[key], constants[key] = "constexpr", value
            else:
                signature[key] = mangle_type(value)
        self.count += 1
        print(f"{self.name} {self.count}: {self.compile(signature, constants, num_warps)}", flush=True)

    def compile(self, signature: dict[str, str], constants: dict[str, object], warps: int) -> str:
        import triton
        from triton.backends.compiler import GPUTarget

        source = triton.compiler.ASTSource(self.kernel, signature, constants)
        try:
            target = GPUTarget("cuda", self.target, 32)
            built = triton.compile(source, target=target, options={"num_warps": warps})
        except Exception as error:  # told line by line, so that one kernel does not hide the others
            return " ".join(f"{type(error).__name__} {error}".split())
        return str(built.metadata.shared) if built.asm["cubin"] else "no cubin"


def main(case: str, target: str) -> None:
    for op, name in entries():
        module = importlib.import_module(f"common.ops.{op}.kernel")
        setattr(module, name, Launcher(f"{op}.{name}", getattr(module, name), int(target)))
    for run in launches(case):
        run()


if __name__ == "__main__":
    main(*sys.argv[1:])
