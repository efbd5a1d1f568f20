"""Import paths, one thread, NaN in uninitialised memory, the shared data, and the comparison all operators use."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
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
HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if HAS_TRITON and KERNEL_DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run as Python; Triton reads it where a kernel is first imported


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.*is deprecated:DeprecationWarning")
    config.addinivalue_line("markers", "gpu: needs a CUDA device, skipped elsewhere")
    config.addinivalue_line("markers", "slow: more than ten CPU-seconds; leave them out by -m 'not slow'")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU the kernels' tests run on it, and so are chosen by `-m gpu` too."""
    for item in items if KERNEL_DEVICE == "cuda" else ():
        values = getattr(getattr(item, "callspec", None), "params", {}).values()
        if "triton" in values or "kernel_device" in getattr(item, "fixturenames", ()) or "kernel" in item.name:
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and KERNEL_DEVICE != "cuda":
        pytest.skip("needs a CUDA device")


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
def kernel_device() -> Iterator[torch.device]:
    """Where Triton kernels are tested, float32 multiplied in full: a GPU, else the CPU in Triton's interpreter."""
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield torch.device(KERNEL_DEVICE)
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture
def assert_backends_agree(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compare a layer in float32 with the reference in float64: the output, and the gradient to every input by name."""

    def check(
        op: Callable[..., Tensor],
        inputs: dict[str, Tensor],
        arrange: Callable[[Tensor], Tensor],
        *,
        backend: str = "lean",
        rtol: float = 1e-5,
        atol: float = 1e-5,
    ) -> None:
        device = request.getfixturevalue("kernel_device") if backend == "triton" else torch.device("cpu")
        expected = _outcome(op, inputs, arrange, "reference", torch.float64, torch.device("cpu"))
        found = _outcome(op, inputs, arrange, backend, torch.float32, device)
        for name, value in expected.items():
            assert value.abs().max() > 0, f"{name} is zero everywhere, so that nothing was compared"
            got = found[name]
            assert got.dtype == torch.float32, f"{name} is {got.dtype}"
            torch.testing.assert_close(
                got.double().cpu(), value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )

    return check


def _outcome(
    op: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    arrange: Callable[[Tensor], Tensor],
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """Output of one layer, and the gradients to the floating inputs."""
    leaves = {}
    for name, x in inputs.items():
        x = x.to(device, dtype if x.is_floating_point() else x.dtype)
        # detach keeps the strides, so that every leaf has the layout under test
        leaves[name] = arrange(x).detach().requires_grad_(x.is_floating_point())
    out = op(**leaves, backend=backend)
    names = [name for name, x in leaves.items() if x.requires_grad]
    grad = torch.randint(-8, 9, out.shape, generator=torch.Generator().manual_seed(9)) / 4  # exact in every type
    grads = torch.autograd.grad(out, [leaves[name] for name in names], arrange(grad.to(device, out.dtype)))
    return {"output": out.detach()} | {f"gradient of {n}": g for n, g in zip(names, grads)}


@pytest.fixture(params=(torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
def assert_half_kernel_agrees(request: pytest.FixtureRequest, kernel_device: torch.device) -> Callable[..., None]:
    """Compare a kernel on half inputs with itself on the same numbers in float32: only the result may be rounded.

    `single` names the results that are float32 whatever the inputs.
    """

    def check(op: Callable[..., Tensor], inputs: dict[str, Tensor], *, single: tuple[str, ...] = ()) -> None:
        dtype = request.param
        rounded = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        expected = _outcome(op, rounded, Tensor.contiguous, "triton", torch.float32, kernel_device)
        found = _outcome(op, rounded, Tensor.contiguous, "triton", dtype, kernel_device)
        for name, value in expected.items():
            assert found[name].dtype == (torch.float32 if name in single else dtype), name
            # half a unit in the last place, and sums of another order on a GPU
            rtol = 1e-5 if name in single else torch.finfo(dtype).eps
            torch.testing.assert_close(
                found[name].float(), value, rtol=rtol, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )

    return check


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Check that a backend which cannot run on the CPU, or on these types, or does not exist is refused, and why."""

    def check(op: Callable[..., object], inputs: dict[str, object], *, has_kernel: bool = True) -> None:
        def refuses(reason: str, inputs: dict[str, object] = inputs) -> None:
            with pytest.raises(RuntimeError, match=rf"\w+\(\) cannot run backend 'triton': .*{reason}"):
                op(**inputs, backend="triton")

        if not has_kernel:
            refuses("has no Triton kernel in this version")
        elif not HAS_TRITON:
            refuses("Triton is not installed")
        else:
            double = {
                k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in inputs.items()
            }
            double = {k: x.to(KERNEL_DEVICE) if isinstance(x, Tensor) else x for k, x in double.items()}
            refuses("kernels take float32, float16 and bfloat16, the tensor is torch.float64", double)
            monkeypatch.delenv("TRITON_INTERPRET", raising=False)
            refuses("the tensor is on cpu, not on a CUDA device")
        with pytest.raises(ValueError, match="'backend' must be one of reference, lean, triton or None, got 'cuda'"):
            op(**inputs, backend="cuda")

    return check
