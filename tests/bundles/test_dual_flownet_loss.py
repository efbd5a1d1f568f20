"""The loss of Dual-FlowNet against eq. 2 to 12 written out, and known values."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dual_flownet_cases import MODES, SIZE, SMALL, bold, scans

from common.losses import dice, diffusion, label_dice, lncc
from common.ops import warp
from dual_flownet import DualFlowLoss, DualFlowNet


@pytest.fixture
def step() -> tuple:
    """A training step of a bold network, scans and random classes."""
    image = scans()
    return bold(DualFlowNet(**SMALL)).forward_train(image), image, torch.randint(0, 4, (1, 2, *SIZE)).float()


def test_loss_is_eq_12(step: tuple) -> None:
    """Every term and every weight, from the formulas."""
    result, image, label = step
    moving, fixed = image.chunk(2, 1)
    loss = DualFlowLoss(alpha=2, beta=3, gamma=5, eta=7, seg_weight=11, window=5, region_reduction="mean")
    terms = loss.terms(result, image, label)
    region = lncc(warp(result.roi_moving, result.disp_region), result.roi_fixed, window=5)
    torch.testing.assert_close(terms["region"], region + 2 * diffusion(result.disp_region))
    whole = lncc(warp(moving, result.disp), fixed, window=5)
    torch.testing.assert_close(terms["global"], whole + 3 * diffusion(result.disp_global))
    back = lncc(warp(fixed, result.disp_inverse), warp(moving, result.disp_region), window=5)
    torch.testing.assert_close(terms["rcc"], 7 * (back + 5 * diffusion(result.disp_inverse)))
    both = sum(
        loss.segmentation(getattr(result, f"logits_{name}"), label[:, n : n + 1])
        for n, name in ((0, "moving"), (1, "fixed"))
    )
    torch.testing.assert_close(terms["seg"], 11 * both)
    torch.testing.assert_close(loss(result, image, label), sum(terms.values()))


@pytest.mark.parametrize("mode", MODES)
def test_loss_follows_the_mode(mode: str) -> None:
    image = scans()
    terms = DualFlowLoss(window=3).terms(DualFlowNet(mode=mode, **SMALL).forward_train(image), image, image.round())
    expected = {"global": {"global"}, "region": {"seg", "region"}, "both": {"seg", "region", "global"}}
    assert set(terms) == expected.get(mode, {"seg", "region", "global", "rcc"})


def test_paper_weights() -> None:
    loss = DualFlowLoss()
    assert (loss.alpha, loss.beta, loss.gamma, loss.eta) == (1, 1, 1, 0.5)
    assert loss.dice_weight == loss.label_weight == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_counts_as_its_pairs(mode: str) -> None:
    """The loss of two pairs, one of them without labels and with smaller regions, is the mean of their losses."""
    net, loss = bold(DualFlowNet(mode=mode, **SMALL)), DualFlowLoss(window=3, dice_weight=1.0, label_weight=1.0)
    image = torch.cat([scans(), scans().square()])
    label = torch.randint(0, 4, (2, 2, *SIZE)).float()
    label[1] = -1
    together = loss(net.forward_train(image), image, label)
    alone = [loss(net.forward_train(image[n : n + 1]), image[n : n + 1], label[n : n + 1]) for n in (0, 1)]
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2)
    assert abs(alone[0] - alone[1]) > 0.1


def test_dice_of_the_labels_moves_the_flows(step: tuple) -> None:
    result, image, label = step
    with_labels = DualFlowLoss(window=3, label_weight=2.0).terms(result, image, label)
    plain = DualFlowLoss(window=3).terms(result, image, label)
    assert set(with_labels) == {*plain, "labels"}
    gradients = torch.autograd.grad(with_labels["labels"], [result.disp_region, result.disp_global])
    assert all(g.abs().max() > 1e-6 for g in gradients)
    expected = label_dice(result.disp, label[:, :1], label[:, 1:])
    torch.testing.assert_close(with_labels["labels"], 2 * expected)


def test_labels_finer_than_the_classes(step: tuple) -> None:
    """The segmentation is taught the classes that the labels are parts of, the flows the labels themselves."""
    result, image, _ = step
    label = torch.randint(-1, 6, (1, 2, *SIZE)).float()
    classes = torch.tensor([0, 1, 1, 2, 3, 3, -1])[label.long()].float()
    fine = DualFlowLoss(window=3, label_weight=2.0, class_of=[1, 1, 2, 3, 3]).terms(result, image, label)
    coarse = DualFlowLoss(window=3, label_weight=2.0).terms(result, image, classes)
    torch.testing.assert_close(fine["seg"], coarse["seg"])
    torch.testing.assert_close(fine["labels"], 2 * label_dice(result.disp, label[:, :1], label[:, 1:]))
    assert (fine["labels"] - coarse["labels"]).abs() > 0.05


def test_segmentation_loss_known_values() -> None:
    """Stage 0 of 2 x 2 x 2 voxels, one unknown; stage 1 sees the voxel at the corner only."""
    target = torch.zeros(1, 1, 2, 2, 2)
    target[0, 0, 0, 0, 0], target[0, 0, 1, 1, 1] = 1, -1
    fine = torch.zeros(1, 2, 2, 2, 2)
    fine[0, 1, 0, 0, 0] = 3.0  # class 1 where it should be; the others undecided
    fine[0, 0, 1, 1, 1] = 50.0  # what is said of the unknown voxel does not count
    coarse = torch.tensor([0.0, 2.0]).view(1, 2, 1, 1, 1)
    first = (np.log1p(np.exp(-3.0)) + 6 * np.log(2)) / 7
    found = DualFlowLoss().segmentation([fine, coarse], target)
    assert found.item() == pytest.approx((first + np.log1p(np.exp(-2.0))) / 2, abs=1e-5)


def test_coarse_stages_see_the_voxels_they_lie_on() -> None:
    """A perfect prediction of the labels at 0, 4, 8, ... costs nothing, one that is shifted by a voxel does."""
    target = torch.randint(0, 4, (1, 1, 9, 8, 11))
    exact = 30 * F.one_hot(target[:, 0], 4).movedim(-1, 1).float()
    perfect = [exact[..., ::step, ::step, ::step] for step in (1, 2, 4)]
    loss = DualFlowLoss(dice_weight=1.0)
    assert loss.segmentation(perfect, target).abs() < 1e-4
    shifted = [perfect[0], exact[..., 1::2, ::2, ::2].repeat_interleave(2, 2)[:, :, :5], perfect[2]]
    assert loss.segmentation(shifted, target) > 1


def test_dice_in_the_segmentation_loss() -> None:
    """Over the classes without background, at known voxels only."""
    target = torch.randint(0, 4, (1, 1, 4, 5, 6)).float()
    target[..., 3:] = -1
    logits = torch.randn(1, 4, 4, 5, 6)
    plain, with_dice = (DualFlowLoss(dice_weight=w).segmentation([logits], target) for w in (0.0, 2.0))
    one_hot = F.one_hot(target[0, 0, ..., :3].long(), 4).permute(3, 0, 1, 2)[None, 1:]
    expected = dice(logits.softmax(1)[:, 1:, ..., :3], one_hot)
    torch.testing.assert_close(with_dice - plain, 2 * expected)


def test_scans_without_labels(step: tuple) -> None:
    """One unlabelled scan leaves the loss of the other alone; two give no segmentation loss, finite gradients."""
    result, image, label = step
    loss, unknown = DualFlowLoss(dice_weight=1.0, window=3), torch.full_like(label, -1.0)
    half = torch.cat([label[:, :1], unknown[:, 1:]], 1)
    expected = loss.segmentation(result.logits_moving, label[:, :1])
    torch.testing.assert_close(loss.terms(result, image, half)["seg"], expected)
    terms = loss.terms(result, image, unknown)
    assert terms["seg"] == 0 and len(terms) == 4
    logits = [*result.logits_moving, *result.logits_fixed]
    gradients = torch.autograd.grad(terms["seg"], logits, retain_graph=True)
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("roi_mode", ("class", "union"))
def test_region_reduction(roi_mode: str) -> None:
    """roi: the mean over the fixed scan's regions; sum: the mean times the number of volumes."""
    image = scans()
    result = bold(DualFlowNet(roi_mode=roi_mode, **SMALL)).forward_train(image)
    warped = warp(result.roi_moving, result.disp_region)
    by = {
        name: DualFlowLoss(window=3, region_reduction=name).region_lncc(warped, result)
        for name in ("roi", "mean", "sum")
    }
    torch.testing.assert_close(by["mean"], lncc(warped, result.roi_fixed, window=3))
    torch.testing.assert_close(by["sum"], (3 if roi_mode == "class" else 1) * by["mean"])
    share = result.logits_fixed[0].detach().softmax(1)
    weight = share[:, 1:] if roi_mode == "class" else 1 - share[:, :1]
    torch.testing.assert_close(by["roi"], lncc(warped, result.roi_fixed, window=3, mask=weight))
    assert abs(by["roi"] - by["mean"]) > 1e-3, "the weights matter"


@pytest.mark.parametrize("roi_mode", ("class", "union"))
def test_regions_of_several_channels(roi_mode: str) -> None:
    """As many channels as classes: the union is not taken for classes, and a class weighs all of its channels."""
    image = scans(channels=3)
    result = bold(DualFlowNet(3, roi_mode=roi_mode, **SMALL)).forward_train(image)
    warped = warp(result.roi_moving, result.disp_region)
    share = result.logits_fixed[0].detach().softmax(1)
    weights = (
        (1 - share[:, :1]).expand(-1, 3, -1, -1, -1) if roi_mode == "union" else share[:, [1, 1, 1, 2, 2, 2, 3, 3, 3]]
    )
    expected = lncc(warped, result.roi_fixed, window=3, mask=weights)
    term = DualFlowLoss(window=3, alpha=0.0).terms(result, image, torch.full_like(image[:, :2], -1.0))["region"]
    torch.testing.assert_close(term, expected)


def test_vague_segmentations_do_not_pay() -> None:
    """The reason for "roi": with the plain mean, uniform probabilities beat perfect ones on a registered pair."""
    image = scans((24, 24, 24))[:, :1].expand(-1, 2, -1, -1, -1)
    net = DualFlowNet(**SMALL)
    classes = F.one_hot((image[:, 0] * 4).long().clamp(0, 3), 4).movedim(-1, 1).float()
    still = torch.zeros(1, 3, 24, 24, 24)
    score = {}
    for name, logits in (("sharp", 40 * classes), ("vague", torch.zeros_like(classes))):
        rois = net.rois(logits, image[:, :1])
        result = net.forward_train(image)._replace(roi_fixed=rois, logits_fixed=[logits], disp_region=still)
        for reduction in ("roi", "mean"):
            score[name, reduction] = DualFlowLoss(region_reduction=reduction, window=3).region_lncc(rois, result)
    assert score["vague", "mean"] < score["sharp", "mean"] - 0.1
    assert score["sharp", "roi"] < -0.8


def test_loss_rejects() -> None:
    with pytest.raises(ValueError, match=r"'region_reduction' must be one of roi, mean, sum, got 'max'"):
        DualFlowLoss(region_reduction="max")
