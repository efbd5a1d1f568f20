"""Exported networks: the displacement of the eager network, in a process that has neither this collection nor MONAI."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT
from monai.bundle import ckpt_export, onnx_export
from torch import Tensor

from common import InputError
from common.__main__ import main
from common.phantom import Deformation, sample
from common.publish.export import export, network_of
from common.run.engines import load_weights

BUNDLES = sorted(path for path in (ROOT / "bundles").iterdir() if path.is_dir())
SIZES = ((32, 48, 32), (40, 36, 44))
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is not to be had here")
sys.meta_path.insert(0, Blocked())
"""
TORCH = """
import torch
run = {load}
for n in {sizes}:
    with torch.no_grad():
        torch.save(run(torch.load(f"image{{n}}.pt")){output}, f"found{{n}}.pt")
try:
    run(torch.load("image{other}.pt"))
except AssertionError as error:
    print("refused:", error)
"""
ONNX = """
import numpy, onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
name = {input} or session.get_inputs()[0].name
numpy.save("found{own}.npy", session.run({output}, {{name: numpy.load("image{own}.npy")}})[0])
try:
    session.run(None, {{name: numpy.load("image{other}.npy")}})
except Exception as error:
    print("refused:", type(error).__name__)
"""


@pytest.fixture(params=BUNDLES, ids=lambda path: path.name, scope="module")
def bundle(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def pairs(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[Tensor, Tensor | None]]]:
    """A folder with images of two sizes and nothing else, and what the eager network makes of them.

    Dual-FlowNet in float64, and how far float32 is from that: its steep flows make much of the rounding, differently
    with one thread or two.

    SAMConvex of the second with the layers that exports hold: summing in another order than the lean ones do, these
    choose another of nearly equal offsets in a tenth of the phantom's voxels there.
    """
    folder = tmp_path_factory.mktemp("alone")
    net = load_weights(network_of(bundle), bundle / "models" / "model.pt").eval()
    expected = []
    for n, size in enumerate(SIZES):
        scans = [sample(size, np.diag([5.0, 5.0, 5.0, 1.0]), moved, seed=0)[0] for moved in (Deformation(0), None)]
        image = torch.from_numpy(np.stack(scans)[None])
        image /= image.max()
        torch.save(image, folder / f"image{n}.pt")
        np.save(folder / f"image{n}.npy", image.numpy())
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            if n > 0 and bundle.name == "samconvex":
                patch.setattr(torch.compiler, "is_exporting", lambda: True)
            expected.append(net(image))
            if bundle.name == "dual_flownet":
                exact = deepcopy(net).double()(image.double()).float()
                expected[n] = exact, (expected[n] - exact).abs()
            else:
                expected[n] = expected[n], None
        assert expected[n][0].abs().mean() > 0.05
    return folder, expected


def alone(folder: Path, code: str, *blocked: str) -> str:
    """Run Python in that folder, isolated from the environment and the working directory, some packages forbidden."""
    names = {"common", "monai", *(path.name for path in BUNDLES), *blocked}
    line = [sys.executable, "-I", "-c", BLOCK.format(blocked=names) + code]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def compare(found: Tensor, expected: Tensor, rounding: Tensor | None, name: str) -> None:
    """Not every voxel: where two k-means clusters or two offsets of a cost volume are equally good, rounding decides,
    and smoothing carries that to the neighbourhood. Where the rounding of torch is known, three times that."""
    assert found.shape == expected.shape
    error = (found - expected).abs()
    assert error.mean() <= 3e-3 * expected.abs().mean()
    if rounding is None:
        assert (error <= 1e-3).double().mean() >= (0.95 if name == "samconvex" else 0.99)
    else:
        assert error.mean() <= 3 * rounding.mean() and rounding.mean() <= 1e-3
        most = rounding.flatten().quantile(0.99)
        assert error.flatten().quantile(0.99) <= 3 * most and most <= 3e-3


def options(bundle: Path, output: Path, size: tuple[int, int, int] = SIZES[0]) -> dict:
    return {
        "net_id": "network_def",
        "filepath": str(output),
        "ckpt_file": str(bundle / "models" / "model.pt"),
        "config_file": str(bundle / "configs" / "inference.json"),
        "meta_file": str(bundle / "configs" / "metadata.json"),
        "input_shape": [1, 2, *size],
        "bundle_root": str(bundle),
    }


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript(bundle: Path, pairs: tuple) -> None:
    """Traced on one size by MONAI's ckpt_export, it takes any other, too."""
    folder, expected = pairs
    ckpt_export(**options(bundle, folder / "model.ts"), use_trace=True)
    assert "monai_registration" not in str(torch.jit.load(folder / "model.ts").inlined_graph), "an operator of ours"
    alone(folder, TORCH.format(load="torch.jit.load('model.ts')", sizes=[0, 1], other=0, output=""))
    for n, value in enumerate(expected):
        compare(torch.load(folder / f"found{n}.pt"), *value, bundle.name)


@pytest.mark.slow
@pytest.mark.parametrize("own", (0, 1))
def test_onnx(own: int, bundle: Path, pairs: tuple) -> None:
    """MONAI's onnx_export; the graph has the size of its example, and onnxruntime refuses another."""
    pytest.importorskip("onnxruntime", reason="onnxruntime of the extra [export] is not installed")
    folder, expected = pairs
    # onnxruntime optimizes by itself, the exporter takes minutes for it; MONAI hands options on with use_trace only.
    # onnxscript gives a convolution without bias one of the wrong shape, which its optimizer takes away.
    quick = {"use_trace": True, "converter_kwargs": {"optimize": bundle.name == "samconvex"}}
    onnx_export(**options(bundle, folder / "model.onnx", SIZES[own]), **quick)
    told = alone(folder, ONNX.format(own=own, other=1 - own, input=None, output=None), "torch")
    assert "refused: " in told
    compare(torch.from_numpy(np.load(folder / f"found{own}.npy")), *expected[own], bundle.name)


@pytest.mark.slow
@pytest.mark.parametrize("own", (0, 1))
def test_common_export_to_pt2(own: int, bundle: Path, pairs: tuple) -> None:
    """The program has the size it was made for and refuses another."""
    folder, expected = pairs
    export(str(bundle), folder / "model.pt2", size=SIZES[own])
    load = "torch.export.load('model.pt2').module()"
    told = alone(folder, TORCH.format(load=load, sizes=[own], other=1 - own, output='["disp"]'))
    assert "refused: Guard failed: image.size()[2]" in told
    compare(torch.load(folder / f"found{own}.pt"), *expected[own], bundle.name)
    program = torch.export.load(folder / "model.pt2")
    assert not [node for node in program.graph.nodes if "monai_registration" in str(node.target)], "operator of ours"


def test_common_export_to_torchscript(bundle: Path, pairs: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command itself; traced on one size, it takes any other, too."""
    folder, expected = pairs
    words = ["export", str(bundle), str(folder / "named.ts"), "--format", "torchscript", "--size", "32,48,32"]
    monkeypatch.setattr(sys, "argv", ["common", *words])
    main()
    alone(folder, TORCH.format(load="torch.jit.load('named.ts')", sizes=[0, 1], other=0, output='["disp"]'))
    for n, value in enumerate(expected):
        compare(torch.load(folder / f"found{n}.pt"), *value, bundle.name)


@pytest.mark.slow
def test_common_export_to_onnx(bundle: Path, pairs: tuple) -> None:
    """`image` in, `disp` out, by name."""
    pytest.importorskip("onnxruntime", reason="onnxruntime of the extra [export] is not installed")
    folder, expected = pairs
    export(str(bundle), folder / "model.onnx", size=SIZES[0])
    told = alone(folder, ONNX.format(own=0, other=1, input="'image'", output=["disp"]), "torch")
    assert "refused: " in told
    compare(torch.from_numpy(np.load(folder / "found0.npy")), *expected[0], bundle.name)


FAULTS = {
    "ending": (("dual_flownet", "model.bin", (32, 32, 32)), "model.bin: the file must end in .pt2, .ts, .onnx"),
    "other": (("dual_flownet", "model.ts", (32, 32, 32), "onnx"), "model.ts: the file must end in .onnx"),
    "format": (("dual_flownet", "m.ts", (32, 32, 32), "ts"), "--format must be one of pt2, torchscript, onnx, got ts"),
    "number": (("dual_flownet", "model.pt2", 32), "--size must be three numbers of voxels, as 96,112,96, got 32"),
    "size": (("dual_flownet", "model.pt2", (32, 32)), "--size must be three numbers of voxels, as 96,112,96"),
    "bundle": (("flownet", "model.pt2", (32, 32, 32)), "flownet: no such bundle"),
}


@pytest.mark.parametrize("arguments, sentence", FAULTS.values(), ids=FAULTS)
def test_export_refuses(arguments: tuple, sentence: str, tmp_path: Path) -> None:
    name, file, size, *format = arguments
    with pytest.raises(InputError, match=sentence):
        export(name, tmp_path / file, size=size, format=(format or [""])[0])
    assert list(tmp_path.iterdir()) == []
