"""The segmentations that Dual-FlowNet makes on the way, as results."""

from collections.abc import Hashable, Mapping

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import Transform
from torch import Tensor

from common.ops import plain, warp
from common.run import progress
from common.run.forecast import run_planned
from dual_flownet.network import DualFlowNet


class SegmentPaird(Transform):
    """Add "warped_segmentation" and "fixed_segmentation" (1, I, J, K), class numbers on the grid of "image".

    The moving scan's probabilities are warped by "pred" and the most probable class taken then. A pair that was
    registered in tiles or on a coarser grid is segmented so too. A network without a segmentation network (mode
    "global") adds nothing.

    Args:
        network: whose segmentation network is used.
        save: False adds nothing.
    """

    def __init__(self, network: DualFlowNet, *, save: bool = True) -> None:
        self.network, self.save = network, save

    @torch.no_grad()
    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        if self.network.seg_cnn is None or not self.save:
            return data
        weight = next(self.network.eval().parameters())
        image, disp = (plain(data[key])[None].to(weight.device, weight.dtype) for key in ("image", "pred"))
        for name, scan in zip(("warped", "fixed"), self.network.scans(image)):
            number = self._classes(scan, disp if name == "warped" else None)
            data[f"{name}_segmentation"] = MetaTensor(number.cpu(), affine=data["image"].affine)
        return data

    def _classes(self, scan: Tensor, disp: Tensor | None) -> Tensor:
        """Most probable class (1, I, J, K), of the probabilities warped by `disp`, one after another."""
        told = progress.kept("forecast") or {"plan": "whole", "size": scan.shape[2:]}
        probability = run_planned(self._probabilities, scan, told["plan"], tuple(told["size"]), resize=_resize)
        best = torch.full_like(scan[:, :1], -torch.inf)
        number = torch.zeros_like(best)
        for n, one in enumerate(probability.split(1, dim=1)):
            one = one if disp is None else warp(one, disp)
            number[one > best] = n
            best = torch.maximum(best, one)
        return number[0]

    def _probabilities(self, scan: Tensor) -> Tensor:
        return self.network.probabilities(self.network.seg_cnn(scan)[0])


def _resize(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="trilinear", align_corners=True)
