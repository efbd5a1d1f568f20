"""Weights published by the authors, under our names."""

import re

from torch import Tensor

ENCODER = {
    f"encoder.conv{block}.{layer}.conv": f"encoder.scales.{block}.{layer - (block > 0)}"
    for block, layers in enumerate(((0, 1, 2), (1, 2), (1, 2), (1, 2), (1, 2)))
    for layer in layers
}
HEAD = {"conv1.1.conv": "refine.0", "conv1.2.conv": "refine.1"} | {
    f"conv1_out.{n}.conv": f"flow.{n - 1}" for n in (1, 2, 3)
}
SACB = {"proj_in.conv": "proj_in", "get_kernel": "kernel_mlp", "get_bias": "bias_mlp"}


def from_official(state: dict) -> dict[str, Tensor]:
    """Rename a state dict of the authors' SACB-Net (variant SACB1) for `SACBNet.load_state_dict`.

    Args:
        state: what torch.load gives: {name: tensor} or {"state_dict": {...}}. Size-dependent sampling grids
            ("transformer.*.grid") are left out.

    Returns:
        92 tensors under the names of `SACBNet`; the 27 taps of a SACB's kernel become its last three axes.

    Raises:
        ValueError: a name that no layer of SACB-Net has, or the other variant (SACB2), whose kernels depend on N.

    Source: names and shapes of the released training code's checkpoints.
    """
    state = state.get("state_dict", state)
    renamed = {}
    for name, value in state.items():
        if name.startswith("transformer."):
            continue
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"sacb_proj([2-5])\.(.+)", name)
        if block is None:
            target = (ENCODER | HEAD).get(stem)
            if target is None:
                raise ValueError(f"from_official() 'state' must hold SACB-Net layers only, got {name!r}")
            renamed[f"{target}.{kind}"] = value
        elif block[2] == "w":
            renamed[f"sacb.{block[1]}.weight"] = value.reshape(*value.shape[:2], 3, 3, 3)
        else:
            renamed[f"sacb.{block[1]}.{_sacb_name(name, block[2], value, state)}"] = value
    return renamed


def _sacb_name(name: str, rest: str, value: Tensor, state: dict) -> str:
    for old, new in SACB.items():
        if rest.startswith(old + "."):
            if (
                rest == "get_kernel.0.weight"
                and value.shape[1] != state[name.replace("get_kernel", "get_bias")].shape[1]
            ):
                break
            if rest == "proj_in.conv.weight" and value.shape[-1] != 3:
                raise ValueError(f"from_official() 'state' must be of variant SACB1, got a 1x1x1 {name!r} (SACB2)")
            return new + rest[len(old) :]
    raise ValueError(f"from_official() 'state' must hold SACB-Net layers only, got {name!r}")
