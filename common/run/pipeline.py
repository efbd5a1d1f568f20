"""Registration as a dictionary transform of MONAI: drops into a `Compose`, between loading and what comes after."""

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ensure_tuple, ensure_tuple_rep
from torch import Tensor

from common import InputError
from common.run.given import scan_of
from common.run.registrar import Registrar, Result
from common.space import io, mapping

BESIDE = ("label", "points", "mask", "lesion")  # KEY_label, ... are used where they are in the data, as in a pairs CSV
NEAREST = {"nearest": True, "bilinear": False}  # MONAI's names; bilinear is linear along all three axes


class RegisterDeformabled(MapTransform):
    """Register data[moving] to data[fixed]; add the warped scan, the displacement and what is known about the result.

    warped(x) = moving(T(x)) on the grid of the fixed scan, T the whole map, pre-alignment included. The scans are
    MetaTensors, as LoadImaged makes them, (I, J, K) or (C, I, J, K), each on its own grid; or paths, or whatever else
    `Registrar.register` takes. They stay as they are. Also used where they are in the data: MOVING_label and
    FIXED_label (warped, and measured), MOVING_points and FIXED_points, and KEY_mask and KEY_lesion of both.

    Adds, on the device of the fixed scan:
        "warped": MetaTensor (C, I, J, K) float32 on the fixed grid, with its affine.
        "disp": MetaTensor (3, I, J, K) float32 in voxels of the fixed grid, along its axes, pull-back: x + disp(x) is
            the voxel of the fixed grid where the moving scan, brought onto that grid by the affines alone, shows what
            the fixed one shows at x. That is the DDF of `monai.networks.blocks.Warp`; `affine[:3, :3] @ disp` is in mm.
        "warped_label": the map MOVING_label, if it is there, (1, I, J, K), nearest neighbour, in its own type.
        "warped_KEY": each further image of `along`.
        "registration": a dictionary: the pair's row of results.csv, "bundle" and "verdict".

    Args:
        keys: of the moving scan and of the fixed one.
        bundle: name of the bundle, or its folder.
        along: keys of further images in the space of the moving scan, on any grid, that are warped as well.
        mode: "nearest" (labels) or "bilinear" (scans), of all of them or one each.
        config: one more config, laid over the bundle's inference.json.
        allow_missing_keys: leave data without one of the two scans as it is, and pass over missing ones of `along`.
        options: those of the command line by their names, as device="cuda:0", refine_steps=50, prealign="rigid".

    Raises:
        InputError: not two keys, an unknown mode, bundle or option; in use, what `Registrar.register` refuses.
        KeyError: a key that the data lacks.
    """

    def __init__(
        self,
        keys: KeysCollection = ("moving", "fixed"),
        bundle: str | os.PathLike = "samconvex",
        *,
        along: KeysCollection = (),
        mode: str | Sequence[str] = "nearest",
        config: str | os.PathLike = "",
        allow_missing_keys: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if len(self.keys) != 2:
            raise InputError(f"RegisterDeformabled() 'keys' must be two, of the moving and fixed scan, got {self.keys}")
        self.along = ensure_tuple(along)
        self.mode = ensure_tuple_rep(mode, len(self.along))
        if unknown := [name for name in self.mode if name not in NEAREST]:
            raise InputError(f"RegisterDeformabled() 'mode' must be one of {', '.join(NEAREST)}, got {unknown[0]!r}")
        self.registrar = Registrar(bundle, config=config, **options)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        if len(present := list(self.key_iterator(data))) < 2:
            return data
        scans = dict(zip(("moving", "fixed"), present))
        given = {f"{role}_{kind}": data.get(f"{key}_{kind}") for role, key in scans.items() for kind in BESIDE}
        given = {name: value for name, value in given.items() if value is not None}
        moving, fixed = (data[key] for key in scans.values())
        result = self.registrar.register(moving, fixed, **given)
        device = fixed.device if isinstance(fixed, Tensor) else "cpu"
        size = result.pair.fixed.shape[1:]
        found = {"warped": (result.warped, moving)}
        found["disp"] = mapping.disp_of(result.transform, size, result.affine).astype(np.float32), fixed
        if result.warped_label is not None:
            found["warped_label"] = result.warped_label[None], given["moving_label"]
        for key, mode in zip(self.along, self.mode):
            if key in data or not self.allow_missing_keys:
                found[f"warped_{key}"] = _along(str(key), data[key], result, nearest=NEAREST[mode]), data[key]
        for name, (array, source) in found.items():
            data[name] = _tensor(array, source, result.affine).to(device)
        facts = {role: name for role, key in scans.items() if (name := _name(data[key]))}
        facts |= {"bundle": self.registrar.name, "verdict": result.verdict}
        return data | {"registration": result.row | facts}


def _along(key: str, image: Any, result: Result, *, nearest: bool) -> np.ndarray:
    """(C, I, J, K): an image of the moving space on the fixed grid; with `nearest` in the type of the image."""
    array, affine = scan_of(key, image, label=nearest)
    onto = result.pair.fixed.shape[1:], result.affine
    outside = [0.0 if nearest else io.background(channel) for channel in array]
    options = {"transform": result.transform, "nearest": nearest}
    return np.stack([mapping.resample(x, affine, *onto, outside=o, **options) for x, o in zip(array, outside)])


def _tensor(array: np.ndarray, source: Any, affine: np.ndarray) -> MetaTensor:
    """With the name of the file that it was made from, and the type of the labels that it was made from."""
    meta = {"filename_or_obj": _name(source)}
    tensor = MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(affine), meta=meta)
    whole = not tensor.is_floating_point() and isinstance(source, Tensor)
    return tensor.to(source.dtype) if whole else tensor


def _name(scan: Any) -> str:
    """Of a scan's file, "" if it is not known."""
    return str(scan if isinstance(scan, (str, Path)) else getattr(scan, "meta", {}).get("filename_or_obj", ""))
