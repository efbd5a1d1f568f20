"""Import paths, one thread, NaN in uninitialised memory, the shared data, and the comparison all operators use."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
BUNDLES = sorted(p for p in (ROOT / "bundles").iterdir() if p.is_dir())
OPERATOR_TESTS = Path(__file__).parent / "common" / "ops"

for folder in (*BUNDLES, ROOT):  # the repository root ends up first
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))

torch.set_num_threads(1)

LAYOUTS = ("contiguous", "strided", "channels_last")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.*is deprecated:DeprecationWarning")


@pytest.fixture(scope="session")
def repository() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def development_data() -> Path:
    """Folder of the shared development data: REGISTRATION_DATA, else `shared` beside the repository."""
    folder = Path(os.environ.get("REGISTRATION_DATA", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"development data not found at {folder}; set REGISTRATION_DATA to its folder")
    return folder


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_in_empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """While an operator is tested, floating memory that `common` leaves uninitialised holds NaN."""
    if OPERATOR_TESTS not in request.path.parents:
        return
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _with_nan(getattr(owner, name)))


def _with_nan(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def filled(*args, **kwargs) -> Tensor:
        out = create(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        ours = caller.partition(".")[0] == "common"
        return out.fill_(float("nan")) if ours and out.is_floating_point() else out

    return filled


@pytest.fixture(params=LAYOUTS)
def arrange(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """A function that keeps the values of a tensor and changes how they lie in memory."""

    def strided(x: Tensor) -> Tensor:
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    def channels_last(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last_3d) if x.ndim == 5 else x

    return {"contiguous": Tensor.contiguous, "strided": strided, "channels_last": channels_last}[request.param]


@pytest.fixture
def assert_backends_agree() -> Callable[..., None]:
    """Compare lean in float32 with the reference in float64: the output, and the gradient to every input by name."""

    def check(
        op: Callable[..., Tensor],
        inputs: dict[str, Tensor],
        arrange: Callable[[Tensor], Tensor],
        *,
        rtol: float = 1e-5,
        atol: float = 1e-5,
    ) -> None:
        results: dict[str, dict[str, Tensor]] = {}
        for backend, dtype in (("reference", torch.float64), ("lean", torch.float32)):
            leaves = {}
            for name, x in inputs.items():
                x = x.to(dtype) if x.is_floating_point() else x
                # detach keeps the strides, so that every leaf has the layout under test
                leaves[name] = arrange(x).detach().requires_grad_(x.is_floating_point())
            out = op(**leaves, backend=backend)
            grad = arrange(torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(dtype))
            names = [name for name, x in leaves.items() if x.requires_grad]
            grads = torch.autograd.grad(out, [leaves[name] for name in names], grad)
            results[backend] = {"output": out.detach()} | {f"gradient of {n}": g for n, g in zip(names, grads)}
        for name, expected in results["reference"].items():
            assert expected.abs().max() > 0, f"{name} is zero everywhere, so that nothing was compared"
            got = results["lean"][name]
            assert got.dtype == torch.float32, f"{name} is {got.dtype}"
            torch.testing.assert_close(
                got.double(), expected, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )

    return check


@pytest.fixture
def refused() -> Callable[[Callable[[str], object]], None]:
    """Check that a backend which cannot run on the CPU, or does not exist, is refused with the reason."""

    def check(run: Callable[[str], object]) -> None:
        reason = "(no Triton kernel in this version|Triton is not installed|the tensor is on cpu, not on a CUDA device)"
        with pytest.raises(RuntimeError, match=rf"\w+\(\) cannot run backend 'triton': .*{reason}"):
            run("triton")
        with pytest.raises(ValueError, match="'backend' must be one of reference, lean, triton or None, got 'cuda'"):
            run("cuda")

    return check
