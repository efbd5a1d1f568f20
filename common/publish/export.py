"""A bundle's network as one file for programs that have torch, or onnxruntime, and nothing else."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from common import InputError
from common.run.cli import bundle_folder
from common.run.engines import load_weights
from common.space import io

ENDINGS = {"pt2": ".pt2", "torchscript": ".ts", "onnx": ".onnx"}  # format -> that of its file


class Named(nn.Module):
    """A network whose result bears a name: {"disp": disp}."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"disp": self.network(image)}


def export(
    name: str,
    output: str | os.PathLike,
    *,
    size: tuple[int, int, int],
    format: str = "",
    weights: str = "",
    config: str = "",
) -> Path:
    """Write image -> {"disp": network(image)} with its weights: (1, 2C, I, J, K) in, (1, 3, I, J, K) in voxels out.

    The file holds the operators' reference layer, plain torch. A torch.export program and an ONNX graph take images of
    one size, as what a network pads and samples depends on it; TorchScript takes any.

    Args:
        name: of a bundle, or its folder.
        output: file to write, ending in .pt2, .ts or .onnx.
        size: I, J, K of the images.
        format: pt2, torchscript or onnx; by default that of the ending.
        weights: of the network; by default models/model.pt.
        config: further config file with another network_def, laid over inference.json.

    Raises:
        InputError: no such bundle or file, weights that do not fit, another ending, a size that is none, no onnx.
    """
    format = _format_of(str(output), format)
    if not isinstance(size, (tuple, list)) or len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
        raise InputError(f"--size must be three numbers of voxels, as 96,112,96, got {size}")
    bundle = bundle_folder(name)
    net = network_of(bundle, config)
    load_weights(net, weights or bundle / "models" / "model.pt")
    network, image = Named(net).eval(), torch.zeros(1, 2 * int(net.channels), *size)
    with torch.no_grad():
        io.replaced(output, WRITERS[format](network, image))
    return Path(output)


def network_of(bundle: Path, config: str = "") -> nn.Module:
    """The network that a bundle's inference.json describes, and a config laid over it, without weights."""
    if config and not os.path.isfile(config):
        raise InputError(f"{config}: no such file")
    parser = ConfigParser()
    parser.read_config([str(bundle / "configs" / "inference.json"), *filter(None, [config])])
    parser["bundle_root"] = str(bundle)
    return parser.get_parsed_content("network_def")


def _format_of(output: str, format: str) -> str:
    """The format that is asked for, and that the ending of the file agrees with."""
    if format and format not in ENDINGS:
        raise InputError(f"--format must be one of {', '.join(ENDINGS)}, got {format}")
    found = next((name for name, ending in ENDINGS.items() if output.endswith(ending)), "")
    if not found or format not in ("", found):
        endings = ENDINGS[format] if format else ", ".join(ENDINGS.values())
        raise InputError(f"{output}: the file must end in {endings}")
    return found


def _pt2(network: nn.Module, image: Tensor):
    program = torch.export.export(network, (image,))
    return lambda path: torch.export.save(program, path)


def _torchscript(network: nn.Module, image: Tensor):
    # No check by a second run: where two clusters are equally near, rounding decides (common/publish/README.md).
    traced = torch.jit.trace(network, image, strict=False, check_trace=False)
    return lambda path: torch.jit.save(traced, path)


def _onnx(network: nn.Module, image: Tensor):
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError("--format onnx needs onnx and onnxscript: install the extra [export]") from error
    # onnxruntime optimizes when it loads; the exporter's own optimizer takes minutes.
    with _every_convolution_biased(network):
        program = torch.onnx.export(
            network, (image,), input_names=["image"], output_names=["disp"], dynamo=True, optimize=False, verbose=False
        )
    return lambda path: onnx.save(program.model_proto, path)


@contextlib.contextmanager
def _every_convolution_biased(network: nn.Module) -> Iterator[None]:
    """A bias of 0 where there is none: onnxscript would give such a convolution one of the wrong shape."""
    plain = [m for m in network.modules() if isinstance(m, nn.Conv3d) and m.bias is None]
    for module in plain:
        module.bias = nn.Parameter(module.weight.new_zeros(module.out_channels))
    try:
        yield
    finally:
        for module in plain:
            module.bias = None


WRITERS = {"pt2": _pt2, "torchscript": _torchscript, "onnx": _onnx}
