"""Dual-FlowNet, in the order of the paper's section 4: segment, region flow, global flow, inverse of the global flow.

Source: Ma et al., Dual-Flow Transformation Network for Deformable Image Registration with Region Consistency
Constraint. There is no released code. Where the paper leaves something open, the docstrings say what was chosen.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.fields import compose
from common.ops import warp
from dual_flownet.cnn import RegCNN, SegCNN

MODES = ("global", "region", "both", "both+rcc")
ROI_MODES = ("class", "union")
INVERSES = ("fixed_point", "literal")


class Registration(NamedTuple):
    """What a training step sees; displacements (B, 3, I, J, K) in voxels, None where the mode has no such step."""

    disp: Tensor  # the whole: region flow, then global flow
    disp_region: Tensor | None  # Phi_Region
    disp_global: Tensor | None  # Phi_Global
    disp_inverse: Tensor | None  # Phi_Global^-1
    logits_moving: list[Tensor] | None  # (B, classes + 1, ...) at 1, 1/2, 1/4 of the resolution
    logits_fixed: list[Tensor] | None
    roi_moving: Tensor | None  # R_M, (B, channels of the regions, I, J, K)
    roi_fixed: Tensor | None  # R_F

    def pair(self, n: int) -> "Registration":
        """Those of pair n of the batch, as a batch of one."""
        part = slice(n, n + 1)
        parts = ([level[part] for level in x] if isinstance(x, list) else None if x is None else x[part] for x in self)
        return Registration(*parts)


class DualFlowNet(nn.Module):
    """Dual-flow transformation network.

    Args:
        channels: C, channels of one scan.
        classes: N, semantic classes without background.
        mode: "global" (GFN of the paper's Table 2), "region" (RFN), "both" (GRFN) or "both+rcc" (DFN). The last two
            differ in training only.
        roi_mode: "class" gives the region step one volume a class, "union" one volume for all (less memory and time).
        widths: channels of the five levels of either registration network.
        seg_widths: channels of the four levels of the segmentation network.
        inverse: how Phi_Global^-1 is made, see `inverse_flow`.
        inverse_iterations: of the fixed point.
        detach_segmentation: keep the losses of the registration away from the segmentation network.
        recompute: in training, keep the inputs of the three networks only and compute their insides again on the way
            back: less memory, one more forward pass.

    Source: section 4 and Fig. 1. The paper gives no widths: (16, 32, 64, 128, 256) and (16, 32, 64, 128) are the usual
    ones of a U-Net with these levels, the default is smaller. The two registration networks share nothing (the figure
    shows two).
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 27,
        *,
        mode: str = "both+rcc",
        roi_mode: str = "class",
        widths: tuple[int, ...] = (16, 32, 32, 64, 64),
        seg_widths: tuple[int, ...] = (16, 32, 64, 128),
        inverse: str = "fixed_point",
        inverse_iterations: int = 1,
        detach_segmentation: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("mode", mode, MODES),
            ("roi_mode", roi_mode, ROI_MODES),
            ("inverse", inverse, INVERSES),
        ):
            if value not in known:
                raise ValueError(f"DualFlowNet() '{name}' must be one of {', '.join(known)}, got {value!r}")
        for name, value in (("classes", classes), ("inverse_iterations", inverse_iterations)):
            if value < 1:
                raise ValueError(f"DualFlowNet() '{name}' must be >= 1, got {value}")
        self.channels, self.classes, self.mode, self.roi_mode = channels, classes, mode, roi_mode
        self.inverse, self.inverse_iterations = inverse, inverse_iterations
        self.detach_segmentation, self.recompute = detach_segmentation, recompute
        regions = channels * (classes if roi_mode == "class" else 1)
        has_region, has_global = mode != "global", mode != "region"
        self.seg_cnn = SegCNN(channels, classes + 1, tuple(seg_widths)) if has_region else None
        self.region_cnn = RegCNN(2 * regions, tuple(widths)) if has_region else None
        self.global_cnn = RegCNN(2 * channels, tuple(widths)) if has_global else None
        self.to(memory_format=torch.channels_last_3d)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 2C, I, J, K), first C channels moving, last C fixed -> displacement (B, 3, I, J, K) in voxels."""
        return self.register(image, inverse=False).disp

    def forward_train(self, image: Tensor) -> Registration:
        """The same displacement with all that the losses look at: segmentations, regions, both flows, the inverse."""
        return self.register(image, inverse=self.mode == "both+rcc")

    def register(self, image: Tensor, *, inverse: bool) -> Registration:
        """Sections 4.1 to 4.3 for a packed pair; `inverse` adds eq. 9.

        The composite is disp(x) = Phi_Global(x) + Phi_Region(x + Phi_Global(x)), so that the moving scan is
        interpolated once; the paper warps the warped scan again.
        """
        moving, fixed = self.scans(image)
        disp_region = disp_global = disp_inverse = None
        logits_moving = logits_fixed = roi_moving = roi_fixed = None
        if self.region_cnn is not None:  # section 4.1
            logits = self.run(self.seg_cnn, torch.cat([moving, fixed]))
            logits_moving, logits_fixed = (list(half) for half in zip(*[level.chunk(2) for level in logits]))
            roi_moving, roi_fixed = self.rois(logits_moving[0], moving), self.rois(logits_fixed[0], fixed)
            disp_region = disp = self.run(self.region_cnn, roi_moving, roi_fixed)
        if self.global_cnn is not None:  # section 4.2
            start = moving if disp_region is None else warp(moving, disp_region)  # W_RM
            disp_global = self.run(self.global_cnn, start, fixed)
            disp = disp_global if disp_region is None else compose(disp_region, disp_global)
            disp_inverse = self.inverse_flow(disp_global) if inverse else None  # section 4.3
        return Registration(
            disp, disp_region, disp_global, disp_inverse, logits_moving, logits_fixed, roi_moving, roi_fixed
        )

    def scans(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Moving and fixed scan of a packed pair."""
        if image.ndim != 5 or image.shape[1] != 2 * self.channels:
            shape = f"(B, {2 * self.channels}, I, J, K), moving then fixed"
            raise ValueError(f"DualFlowNet() 'image' must have shape {shape}, got {tuple(image.shape)}")
        moving, fixed = image.chunk(2, dim=1)
        return moving, fixed

    def rois(self, logits: Tensor, scan: Tensor) -> Tensor:
        """Regions with their texture, s' * I (section 4.1): (B, C N, I, J, K), or (B, C, ...) for their union.

        Soft probabilities, the background's left out. The paper names neither; PC-Reg-RT, whose region step this is,
        takes the arg-max in training.
        """
        probability = self.probabilities(logits)
        if self.detach_segmentation:
            probability = probability.detach()
        inside = probability[:, 1:] if self.roi_mode == "class" else 1 - probability[:, :1]
        inside, scan = (x.permute(0, 2, 3, 4, 1) for x in (inside, scan))  # as they lie in memory
        return (inside.unsqueeze(5) * scan.unsqueeze(4)).flatten(4, 5).permute(0, 4, 1, 2, 3)

    @staticmethod
    def probabilities(logits: Tensor) -> Tensor:
        """Softmax over the classes, which lie next to each other in memory: along axis 1 it would take ten times it."""
        last = logits.to(torch.promote_types(logits.dtype, torch.float32)).permute(0, 2, 3, 4, 1)
        return last.softmax(4).permute(0, 4, 1, 2, 3)

    def segment(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Class probabilities of the moving and of the fixed scan, (B, classes + 1, I, J, K) each, background first.

        Raises:
            ValueError: mode "global", which has no segmentation network.
        """
        if self.seg_cnn is None:
            raise ValueError(f"DualFlowNet.segment() 'mode' must be one of {', '.join(MODES[1:])}, got {self.mode!r}")
        return tuple(self.probabilities(self.seg_cnn(scan)[0]) for scan in self.scans(image))

    def inverse_flow(self, disp: Tensor) -> Tensor:
        """Phi^-1 = I(Phi, -Phi) of eq. 9, differentiable.

        "fixed_point"  v <- -Phi(x + v(x)) from v = -Phi; one update is -Phi sampled at x - Phi(x), which is right to
                       the second order in Phi.
        "literal"      -Phi sampled at x + Phi(x), as the words of the paper have it; wrong in the second order.
        """
        if self.inverse == "literal":
            return -warp(disp, disp)
        inverse = -disp
        for _ in range(self.inverse_iterations):  # common.fields.invert, which is damped, has no gradient
            inverse = -warp(disp, inverse)
        return inverse

    def run(self, module: nn.Module, *inputs: Tensor):
        """`module` of the inputs; with `recompute`, nothing of its inside is kept for the gradient."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)
