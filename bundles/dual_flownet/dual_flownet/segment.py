"""The segmentations that Dual-FlowNet makes on the way, as results."""

from collections.abc import Hashable, Mapping

import torch
from monai.data import MetaTensor
from monai.transforms import Transform

from common.ops import plain, warp
from dual_flownet.network import DualFlowNet


class SegmentPaird(Transform):
    """Add "warped_segmentation" and "fixed_segmentation" (1, I, J, K), class numbers on the grid of "image".

    The moving scan's probabilities are warped by "pred" and the most probable class taken then. A network without a
    segmentation network (mode "global") adds nothing.
    """

    def __init__(self, network: DualFlowNet) -> None:
        self.network = network

    @torch.no_grad()
    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        if self.network.seg_cnn is None:
            return data
        image, disp = plain(data["image"]), plain(data["pred"])
        weight = next(self.network.parameters())
        moving, fixed = self.network.eval().segment(image[None].to(weight.device, weight.dtype))
        disp = disp[None].to(weight.device, weight.dtype)
        for name, classes in (("warped", warp(moving, disp)), ("fixed", fixed)):
            number = classes.argmax(1).float()
            data[f"{name}_segmentation"] = MetaTensor(number.cpu(), affine=data["image"].affine)
        return data
