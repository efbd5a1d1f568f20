"""Weights published by the authors (TensorFlow), under our names."""

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

SHARED = "heads_in heads_out increment_out increment_in semantic attributes_out disp_out".split()
CONVS = "feedback resample regress_in regress_mid regress_out attributes_in disp_in confidence".split()
NORMS = "norm_own norm_other norm_increment norm_attributes norm_semantic".split()
PARAMETERS = {"kernel": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


def _names() -> dict[str, str]:
    """Official layer -> our layer. The official ones are numbered in the order in which the authors' code makes them:
    encoder block by block, the shared layers, then block and RA module in turn."""
    convs, norms = {}, {}
    for n in range(4):
        convs |= {4 * n + i: f"encoder.{n}.convs.{i}" for i in range(3)} | {4 * n + 3: f"skips.{n}"}
        norms |= {3 * n + i: f"encoder.{n}.norms.{i}" for i in range(3)}
    convs |= {16 + i: f"shared.{name}" for i, name in enumerate(SHARED)}
    for k in range(5):
        convs |= {23 + 11 * k + i: f"decoder.{k}.convs.{i}" for i in range(3)}
        convs |= {26 + 11 * k + i: f"aligners.{k}.{name}" for i, name in enumerate(CONVS)}
        norms |= {12 + 8 * k + i: f"decoder.{k}.norms.{i}" for i in range(3)}
        norms |= {15 + 8 * k + i: f"aligners.{k}.{name}" for i, name in enumerate(NORMS)}
    found = {"conv3d" + f"_{n}" * (n > 0): name for n, name in convs.items()}
    found |= {"instance_normalization" + f"_{n}" * (n > 0): name for n, name in norms.items()}
    return found | {"conv3d_transpose": "decoder.4.up", "disp": "flow"}


NAMES = _names()


def from_official(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Rename and transpose the variables of the authors' network for `RAN(variant="released").load_state_dict`.

    Args:
        arrays: {"conv3d_5/kernel": array, ...}. A second number that TensorFlow added to keep names apart
            ("conv3d_3_1") is left out.

    Returns:
        264 tensors, or 254 for the published checkpoint, which holds no confidence layers: that one belongs to
        `RAN(variant="released", confidence=False, mask="raw")`.

    Raises:
        ValueError: a name that no layer of the network has.

    Source: names and shapes of the released code's variables.
    """
    state = {}
    for name, array in arrays.items():
        layer, _, kind = name.rpartition("/")
        stem = re.sub(r"^(.+_\d+)_\d+$", r"\1", layer)
        if stem not in NAMES or kind not in PARAMETERS:
            raise ValueError(f"from_official() 'arrays' must hold the variables of RAN only, got {name!r}")
        value = torch.from_numpy(np.array(array))
        if kind == "kernel":  # spatial axes first: (in, out) last, for the transposed convolution (out, in)
            value = value.permute(4, 3, 0, 1, 2).contiguous()
        state[f"{NAMES[stem]}.{PARAMETERS[kind]}"] = value
    return state
