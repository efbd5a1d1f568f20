"""The loss of Dual-FlowNet (paper eq. 2 to 12)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.losses import dice, diffusion, label_dice, lncc
from common.ops import warp
from dual_flownet.network import Registration

REDUCTIONS = ("roi", "mean", "sum")


class DualFlowLoss(nn.Module):
    """seg_weight L_seg + L_Region + L_Global + eta L_RCC + label_weight L_labels  (eq. 12 with eq. 2).

    L_seg     cross-entropy of both segmentations, mean over the voxels with a label and over the decoder stages, and
              dice_weight times 1 - mean soft Dice; 0 for scans without labels
    L_Region  LNCC(R_F, R_M o Phi_Region) + alpha |grad Phi_Region|^2  (eq. 3 to 5)
    L_Global  LNCC(F, M o Phi) + beta |grad Phi_Global|^2  (eq. 6 to 8), Phi the whole displacement
    L_RCC     LNCC(F o Phi_Global^-1, W_RM) + gamma |grad Phi_Global^-1|^2  (eq. 9 to 11)
    L_labels  1 - mean soft Dice of the moving scan's labels, warped by Phi, with the fixed scan's; 0 if one has none

    A term whose flow the network's mode lacks is left out.

    Args:
        alpha, beta, gamma, eta: as in the paper (section 5.1.3).
        seg_weight: of L_seg, which eq. 12 does not contain.
        dice_weight: of the soft Dice in L_seg; the paper has none.
        label_weight: of L_labels, which the paper does not have either.
        class_of: class of the segmentation that label n is a part of, at n - 1, where labels are finer than those
            classes: L_labels then compares label by label. None where they are the classes.
        window: of the LNCC, in voxels.
        region_reduction: of the LNCC over the volumes of the classes: "roi" averages over the classes weighted by the
            fixed scan's probabilities, "mean" over all classes and voxels, "sum" is the mean times their number.

    Source: section 4. LNCC in its squared, negative form. Eq. 2 also divides by the number of classes. Eq. 3 has no
    normalisation; a class fills so little of the volume that "mean" leaves next to nothing beside the smoothness, and
    both "mean" and "sum" prefer vague probabilities, which spread a region's score over more voxels.
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        eta: float = 0.5,
        seg_weight: float = 1.0,
        dice_weight: float = 0.0,
        label_weight: float = 0.0,
        class_of: list[int] | None = None,
        window: int = 9,
        region_reduction: str = "roi",
    ) -> None:
        super().__init__()
        if region_reduction not in REDUCTIONS:
            known = ", ".join(REDUCTIONS)
            raise ValueError(f"DualFlowLoss() 'region_reduction' must be one of {known}, got {region_reduction!r}")
        self.alpha, self.beta, self.gamma, self.eta = alpha, beta, gamma, eta
        self.seg_weight, self.dice_weight, self.label_weight = seg_weight, dice_weight, label_weight
        self.window, self.region_reduction = window, region_reduction
        classes = None if class_of is None else torch.tensor([0, *class_of, -1])  # the last one is that of label -1
        self.register_buffer("class_of", classes, persistent=False)

    def forward(self, result: Registration, image: Tensor, label: Tensor) -> Tensor:
        """Mean of the pairs' losses; `label` (B, 2, I, J, K): of moving and fixed scan, 0 background, -1 unknown.

        Pair by pair, because the terms divide by sums over regions: a batch then counts as the same pairs on two GPUs.
        """
        each = (self.terms(result.pair(n), image[n : n + 1], label[n : n + 1]) for n in range(len(image)))
        return sum(sum(terms.values()) for terms in each) / len(image)

    def terms(self, result: Registration, image: Tensor, label: Tensor) -> dict[str, Tensor]:
        """The weighted terms by name: "seg", "region", "global", "rcc", those that the mode has, and "labels"."""
        moving, fixed = image.chunk(2, dim=1)
        terms = {}
        if result.disp_region is not None:
            classes = label if self.class_of is None else self.class_of.to(label.device)[label.long()]
            both = zip((result.logits_moving, result.logits_fixed), classes.chunk(2, dim=1))
            terms["seg"] = self.seg_weight * sum(self.segmentation(logits, target) for logits, target in both)
            fit = self.region_lncc(warp(result.roi_moving, result.disp_region), result, channels=moving.shape[1])
            terms["region"] = fit + self.alpha * diffusion(result.disp_region)
        if result.disp_global is not None:
            fit = lncc(warp(moving, result.disp), fixed, window=self.window)
            terms["global"] = fit + self.beta * diffusion(result.disp_global)
        if result.disp_inverse is not None:
            region_warped = moving if result.disp_region is None else warp(moving, result.disp_region)  # W_RM
            fit = lncc(warp(fixed, result.disp_inverse), region_warped, window=self.window)
            terms["rcc"] = self.eta * (fit + self.gamma * diffusion(result.disp_inverse))
        if self.label_weight:
            terms["labels"] = self.label_weight * label_dice(result.disp, *label.chunk(2, dim=1))
        return terms

    @staticmethod
    def one_hot(classes: Tensor, number: int) -> Tensor:
        """Masks (B, number - 1, I, J, K) of the classes 1, 2, ... in (B, 1, I, J, K)."""
        return classes == torch.arange(1, number, dtype=classes.dtype, device=classes.device).view(1, -1, 1, 1, 1)

    def segmentation(self, logits: list[Tensor], classes: Tensor) -> Tensor:
        """L_seg of one scan: `logits` finest first, `classes` (B, 1, I, J, K), -1 for unknown."""
        total = logits[0].new_zeros(())
        for level, stage in enumerate(logits):
            step = 2**level
            target = classes[:, 0, ::step, ::step, ::step].long()  # the voxels on which the coarser ones lie
            known = (target >= 0).unsqueeze(1)
            stage = stage.to(torch.promote_types(stage.dtype, torch.float32))
            entropy = F.cross_entropy(stage, target, ignore_index=-1, reduction="sum") / known.sum().clamp(min=1)
            total = total + entropy
            if self.dice_weight:
                overlap = dice(stage.softmax(1)[:, 1:] * known, self.one_hot(target.unsqueeze(1), stage.shape[1]))
                total = total + self.dice_weight * known.any() * overlap  # of nothing with nothing it would be 1
        return total / len(logits)

    def region_lncc(self, warped: Tensor, result: Registration, *, channels: int = 1) -> Tensor:
        """RLNCC of eq. 3 over the volumes of the regions, `channels` of them a class (or in all, for their union)."""
        if self.region_reduction != "roi":
            number = warped.shape[1] if self.region_reduction == "sum" else 1
            return number * lncc(warped, result.roi_fixed, window=self.window)
        probability = result.logits_fixed[0].detach().float().softmax(1)
        union = warped.shape[1] == channels
        inside = 1 - probability[:, :1] if union else probability[:, 1:]
        return lncc(warped, result.roi_fixed, window=self.window, mask=inside.repeat_interleave(channels, dim=1))
