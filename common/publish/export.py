"""A bundle's network as a torch.export program, for programs that have torch and nothing else."""

import os
from io import BytesIO
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from torch import nn

from common import InputError
from common.run.cli import bundle_folder
from common.run.engines import load_weights
from common.space import io


def export(
    name: str, output: str | os.PathLike, *, size: tuple[int, int, int], weights: str = "", config: str = ""
) -> Path:
    """Write disp = network(image) with its weights as a .pt2 file that `torch.export.load` reads.

    The program holds the operators' reference layer, plain torch, and takes images of one size: what a network pads
    and samples depends on it. Export again for another size; models/model.ts of MONAI's ckpt_export takes any.

    Args:
        name: of a bundle, or its folder.
        output: file to write, ending in .pt2.
        size: I, J, K of the images.
        weights: of the network; by default models/model.pt.
        config: further config file with another network_def, laid over inference.json.

    Raises:
        InputError: no such bundle or file, weights that do not fit, another ending, a size that is none.
    """
    if not str(output).endswith(".pt2"):
        raise InputError(f"{output}: the file must end in .pt2")
    if not isinstance(size, (tuple, list)) or len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
        raise InputError(f"--size must be three numbers of voxels, as 96,112,96, got {size}")
    bundle = bundle_folder(name)
    net = network_of(bundle, config)
    load_weights(net, weights or bundle / "models" / "model.pt")
    image = torch.zeros(1, 2 * int(net.channels), *size)
    with torch.no_grad():
        program = torch.export.export(net.eval(), (image,))
    content = BytesIO()  # where a disk is full, torch's own writer of files ends the process
    torch.export.save(program, content)
    io.replaced(output, lambda partial: partial.write_bytes(content.getbuffer()))
    return Path(output)


def network_of(bundle: Path, config: str = "") -> nn.Module:
    """The network that a bundle's inference.json describes, and a config laid over it, without weights."""
    if config and not os.path.isfile(config):
        raise InputError(f"{config}: no such file")
    parser = ConfigParser()
    parser.read_config([str(bundle / "configs" / "inference.json"), *filter(None, [config])])
    parser["bundle_root"] = str(bundle)
    return parser.get_parsed_content("network_def")
