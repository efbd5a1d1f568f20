"""Dual-FlowNet's networks against the paper's description, its flows and losses against their formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dual_flownet_cases import MODES, SIZE, SMALL, bold, scans, waves
from monai.data import MetaTensor
from torch import Tensor, nn

from common import phantom
from common.fields import compose, inverse_error, jacobian_determinant
from common.losses import dice, lncc
from common.ops import warp
from common.run import progress
from dual_flownet import DualFlowLoss, DualFlowNet, SegmentPaird
from dual_flownet.cnn import RegCNN, SegCNN

# ---- the convolutional networks (section 4.4) -----------------------------------------------------------------------


def layers(module: nn.Module, kind: type) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, kind)]


def test_seg_cnn_is_fig_2a() -> None:
    """Four levels, each with a convolution and (but the lowest) one of stride 2; deconvolutions; an output a stage."""
    net = SegCNN(2, 5, (4, 8, 16, 32))
    convs = [layer for layer in layers(net, nn.Conv3d) if layer.kernel_size == (3, 3, 3)]
    assert sorted(layer.stride[0] for layer in convs) == [1] * 4 + [2] * 3
    deconvs = layers(net, nn.ConvTranspose3d)
    assert [(layer.kernel_size[0], layer.stride[0]) for layer in deconvs] == [(3, 2)] * 3
    assert [(layer.kernel_size[0], layer.out_channels) for layer in net.outputs] == [(1, 5)] * 3
    assert len(layers(net, nn.GroupNorm)) == len(layers(net, nn.ReLU)) == len(convs) + len(deconvs) == 10
    assert {layer.num_channels // layer.num_groups for layer in layers(net, nn.GroupNorm)} == {4}
    shapes = [tuple(x.shape) for x in net(torch.rand(2, 2, *SIZE))]
    assert shapes == [(2, 5, 18, 16, 21), (2, 5, 9, 8, 11), (2, 5, 5, 4, 6)]


def test_reg_cnn_is_fig_2b() -> None:
    """Five levels with one convolution; four decoder stages with 1, 1, 2, 2; one 1x1x1 to three channels."""
    net = RegCNN(6, (4, 8, 8, 12, 16))
    assert len(net.encoder) == 5 and [len(stage) for stage in net.decoder] == [1, 1, 2, 2]
    convs = [layer for layer in layers(net, nn.Conv3d) if layer is not net.flow]
    assert len(convs) == 11 and {layer.kernel_size for layer in convs} == {(3, 3, 3)}
    assert [layer.in_channels for layer in convs[:5]] == [6, 4, 8, 8, 12]
    assert net.flow.kernel_size == (1, 1, 1) and net.flow.out_channels == 3
    assert len(layers(net, nn.GroupNorm)) == len(layers(net, nn.ReLU)) == 11
    disp = net(torch.rand(2, 2, *SIZE), torch.rand(2, 4, *SIZE))
    assert disp.shape == (2, 3, *SIZE) and 0 < disp.abs().max() < 1e-3, "an untrained network barely moves the image"


def test_sizes_of_the_shipped_and_the_wide_network() -> None:
    assert sum(p.numel() for p in DualFlowNet().parameters()) == 2_073_914
    wide = DualFlowNet(widths=(16, 32, 64, 128, 256))
    assert sum(p.numel() for p in wide.parameters()) > 3 * 2_073_914


@pytest.mark.parametrize("size", ((8, 8, 8), (5, 9, 7), (40, 17, 3)))
def test_any_size(size: tuple[int, int, int]) -> None:
    with torch.no_grad():
        assert DualFlowNet(**SMALL)(torch.rand(1, 2, *size)).shape == (1, 3, *size)


# ---- regions --------------------------------------------------------------------------------------------------------


def test_rois_a_class() -> None:
    """s' * I, a volume a class and channel, background left out."""
    net = DualFlowNet(2, **SMALL)
    logits, scan = torch.randn(1, 4, 3, 4, 5), torch.rand(1, 2, 3, 4, 5)
    rois, share = net.rois(logits, scan), logits.exp() / logits.exp().sum(1, keepdim=True)
    assert rois.shape == (1, 6, 3, 4, 5)
    for n in range(3):
        for c in range(2):
            torch.testing.assert_close(rois[:, 2 * n + c], share[:, n + 1] * scan[:, c])


def test_rois_of_the_union() -> None:
    net = DualFlowNet(roi_mode="union", **SMALL)
    logits, scan = torch.randn(1, 4, 3, 4, 5), torch.rand(1, 1, 3, 4, 5)
    torch.testing.assert_close(net.rois(logits, scan), (1 - logits.softmax(1)[:, :1]) * scan)
    assert net.region_cnn.encoder[0].conv.in_channels == 2
    assert DualFlowNet(**SMALL).region_cnn.encoder[0].conv.in_channels == 6


@pytest.mark.parametrize("detach", (False, True))
def test_end_to_end(detach: bool) -> None:
    """The loss of the registration reaches the segmentation network, unless it is detached."""
    net, image = bold(DualFlowNet(detach_segmentation=detach, **SMALL)), scans()
    DualFlowLoss(window=3)(net.forward_train(image), image, torch.full_like(image, -1.0)).backward()
    reached = [p.grad is not None and bool((p.grad != 0).any()) for p in net.seg_cnn.convs.parameters()]
    assert not any(reached) if detach else all(reached)
    assert all((p.grad != 0).any() for p in net.region_cnn.flow.parameters())


# ---- flows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str) -> None:
    """Each mode has its networks and its results, and forward gives the displacement of forward_train."""
    net, image = bold(DualFlowNet(mode=mode, **SMALL)), scans(batch=2)
    has_region, has_global = mode != "global", mode != "region"
    assert (net.seg_cnn is not None, net.region_cnn is not None) == (has_region,) * 2
    assert (net.global_cnn is not None) == has_global
    with torch.no_grad():
        result, disp = net.forward_train(image), net(image)
    torch.testing.assert_close(result.disp, disp)
    assert (result.disp_region is not None, result.roi_moving is not None) == (has_region,) * 2
    assert (result.disp_global is not None) == has_global
    assert (result.disp_inverse is not None) == (mode == "both+rcc")
    for flow in (result.disp, result.disp_region, result.disp_global, result.disp_inverse):
        assert flow is None or (flow.shape == (2, 3, *SIZE) and flow.abs().mean() > 0.05)
    if mode in ("global", "region"):
        torch.testing.assert_close(disp, result.disp_global if mode == "global" else result.disp_region)


class Constant(nn.Module):
    """Stands for a registration network: a known displacement, and a memory of what it was given."""

    def __init__(self, disp: Tensor) -> None:
        super().__init__()
        self.disp = disp

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        self.given = moving, fixed
        return self.disp


def test_steps_in_order() -> None:
    """The region network sees R_M and R_F, the global one W_RM and F; warping by the composite equals both warps."""
    size = (20, 22, 24)
    net, image = DualFlowNet(**SMALL), scans(size)
    net.region_cnn, net.global_cnn = (Constant(waves(size, 2.0, seed)) for seed in (1, 2))
    moving, fixed = image.chunk(2, 1)
    result = net.forward_train(image)
    assert torch.equal(net.region_cnn.given[0], result.roi_moving)
    assert torch.equal(net.region_cnn.given[1], result.roi_fixed)
    once = warp(moving, net.region_cnn.disp)
    torch.testing.assert_close(net.global_cnn.given[0], once)
    assert torch.equal(net.global_cnn.given[1], fixed)
    torch.testing.assert_close(result.disp, compose(net.region_cnn.disp, net.global_cnn.disp))
    ramp = torch.arange(20.0).view(1, 1, 20, 1, 1).expand(1, 1, *size)  # interpolated without error
    both, whole = warp(warp(ramp, net.region_cnn.disp), net.global_cnn.disp), warp(ramp, result.disp)
    assert (both - ramp).abs().max() > 1
    torch.testing.assert_close(both[..., 4:-4, 4:-4, 4:-4], whole[..., 4:-4, 4:-4, 4:-4], rtol=0, atol=1e-4)


def test_rois_come_from_their_own_scan() -> None:
    """Changing the fixed scan leaves the moving scan's segmentation alone: nothing is mixed up in the batch."""
    net, image = DualFlowNet(**SMALL), scans(batch=2)
    other = image.clone()
    other[:, 1] = 1 - other[:, 1]
    with torch.no_grad():
        first, second = net.forward_train(image), net.forward_train(other)
        single = net.forward_train(image[1:])
    torch.testing.assert_close(first.roi_moving, second.roi_moving)
    assert (first.roi_fixed - second.roi_fixed).abs().mean() > 0.01
    torch.testing.assert_close(first.disp[1:], single.disp, rtol=1e-4, atol=1e-8)
    for name in ("logits_moving", "logits_fixed"):
        torch.testing.assert_close(getattr(first, name)[2][1:], getattr(single, name)[2])


def test_inverse_flow() -> None:
    """One update is -Phi at x - Phi(x); its error is of the second order, that of the literal reading larger."""
    disp = waves((20, 18, 22), 1.0, 4)
    errors = {}
    for name, options in (("one", {}), ("five", {"inverse_iterations": 5}), ("literal", {"inverse": "literal"})):
        inverse = DualFlowNet(**SMALL, **options).inverse_flow(disp)
        errors[name] = float(inverse_error(disp, inverse).mean())
        if name == "one":
            torch.testing.assert_close(inverse, -warp(disp, -disp))
        if name == "literal":
            torch.testing.assert_close(inverse, -warp(disp, disp))
    negative = float(inverse_error(disp, -disp).mean())
    assert errors["five"] < 0.1 * errors["one"] and errors["one"] < 0.5 * negative < errors["literal"]


def test_recompute_changes_nothing() -> None:
    image, label = scans(), torch.randint(0, 4, (1, 2, *SIZE)).float()
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = bold(DualFlowNet(recompute=recompute, **SMALL))
        DualFlowLoss(window=3)(net.forward_train(image), image, label).backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_autocast_keeps_displacements_in_float32() -> None:
    net, image = bold(DualFlowNet(**SMALL)), scans()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = net.forward_train(image)
    flows = (result.disp, result.disp_region, result.disp_global, result.disp_inverse)
    assert {flow.dtype for flow in flows} == {torch.float32} and torch.isfinite(result.disp).all()


def test_segment() -> None:
    """Probabilities of both scans; the warped segmentation is the arg-max of warped probabilities."""
    net, image = DualFlowNet(**SMALL), scans()
    with torch.no_grad():
        moving, fixed = net.segment(image)
        result = net.forward_train(image)
    torch.testing.assert_close(moving[:, 1:], result.logits_moving[0].softmax(1)[:, 1:])
    torch.testing.assert_close(fixed.sum(1), torch.ones(1, *SIZE))
    disp = torch.zeros(3, *SIZE)
    disp[1] = 2
    data = {"image": MetaTensor(image[0], affine=torch.diag(torch.tensor([2.0, 2, 2, 1]))), "pred": disp}
    out = SegmentPaird(net)(data)
    warped, still = (out[f"{name}_segmentation"] for name in ("warped", "fixed"))
    assert warped.shape == still.shape == (1, *SIZE) and warped.affine[0, 0] == 2
    assert torch.equal(still[0].as_tensor(), fixed[0].argmax(0).float())
    assert torch.equal(warped[0, :, :-2].as_tensor(), moving[0].argmax(0).float()[:, 2:])
    assert len(still.unique()) > 1, "one class everywhere shows nothing"
    assert set(SegmentPaird(DualFlowNet(mode="global", **SMALL))(data)) == {"image", "pred"}
    assert set(SegmentPaird(net, save=False)(data)) == {"image", "pred"}


@pytest.mark.parametrize("plan", ("tile", "coarsen"))
def test_segment_by_plan(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair that was registered in tiles or on a coarser grid never has its whole grid segmented."""
    net, image = DualFlowNet(**SMALL), scans()
    part, seen = tuple(n // 2 for n in SIZE), []
    net.seg_cnn.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[2:])))
    monkeypatch.setitem(progress._facts, "forecast", {"plan": plan, "size": list(part)})
    out = SegmentPaird(net)({"image": MetaTensor(image[0]), "pred": torch.zeros(3, *SIZE)})
    assert set(seen) == {part} and len(seen) == (2 if plan == "coarsen" else len(seen)) >= 2
    for name in ("warped", "fixed"):
        number = out[f"{name}_segmentation"]
        assert number.shape == (1, *SIZE) and len(number.unique()) > 1


@pytest.mark.parametrize(
    "options, words",
    (
        ({"mode": "rcc"}, r"'mode' must be one of global, region, both, both\+rcc, got 'rcc'"),
        ({"roi_mode": "all"}, "'roi_mode' must be one of class, union, got 'all'"),
        ({"inverse": "exact"}, "'inverse' must be one of fixed_point, literal, got 'exact'"),
        ({"classes": 0}, "'classes' must be >= 1, got 0"),
        ({"inverse_iterations": 0}, "'inverse_iterations' must be >= 1, got 0"),
        ({"widths": (4, 8)}, r"RegCNN\(\) 'widths' must be 5 multiples of 4, got \(4, 8\)"),
        ({"seg_widths": (4, 8, 6, 8)}, r"SegCNN\(\) 'widths' must be 4 multiples of 4"),
    ),
)
def test_rejects(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DualFlowNet(**(SMALL | options))


def test_rejects_other_images() -> None:
    with pytest.raises(ValueError, match=r"'image' must have shape \(B, 2, I, J, K\), moving then fixed, got"):
        DualFlowNet(**SMALL)(torch.rand(1, 3, 8, 8, 8))
    with pytest.raises(ValueError, match=r"segment\(\) 'mode' must be one of region, both, both\+rcc, got 'global'"):
        DualFlowNet(mode="global", **SMALL).segment(torch.rand(1, 2, 8, 8, 8))


# ---- outcome --------------------------------------------------------------------------------------------------------


def test_training_registers_and_segments() -> None:
    """Eighty steps on one pair of phantoms: correlation and Dice of the labels rise, so does that of the segmentations,
    and nothing folds."""
    size, affine = (20, 24, 20), np.diag([8.0, 8.0, 8.0, 1.0])
    affine[:3, 3] = -8 * (np.array(size) - 1) / 2
    person = phantom.Deformation(0, amplitude=24)
    person.matrix, person.shift = np.eye(3), np.zeros(3)
    pairs = [phantom.sample(size, affine, who, seed=n) for n, who in enumerate((person, None))]
    image = torch.from_numpy(np.stack([scan for scan, _ in pairs])[None])
    image, label = image / image.max(), torch.from_numpy(np.stack([classes for _, classes in pairs])[None]).float()
    net = DualFlowNet(classes=9, widths=(8, 8, 16, 16, 16), seg_widths=(16, 32, 64, 64))
    loss, optimizer = DualFlowLoss(window=5, dice_weight=1.0), torch.optim.Adam(net.parameters(), lr=5e-3)

    def scores() -> dict[str, float]:
        with torch.no_grad():
            result = net.forward_train(image)
        moving, fixed = (F.one_hot(x.long()[0], 10).movedim(-1, 1)[:, 1:].float() for x in label.split(1, 1))
        segmented = F.one_hot(result.logits_fixed[0].argmax(1), 10).movedim(-1, 1)[:, 1:]
        return {
            "lncc": -float(lncc(warp(image[:, :1], result.disp), image[:, 1:], window=5)),
            "dice": 1 - float(dice(warp(moving, result.disp, mode="nearest"), fixed)),
            "segmentation": 1 - float(dice(segmented, fixed)),
            "folds": float((jacobian_determinant(result.disp) <= 0).double().mean()),
            "global": float(result.disp_global.abs().mean()),
            "region": float(result.disp_region.abs().mean()),
        }

    before = scores()
    for _ in range(80):
        optimizer.zero_grad()
        loss(net.forward_train(image), image, label).backward()
        optimizer.step()
    after = scores()
    assert after["lncc"] > before["lncc"] + 0.1 and after["dice"] > before["dice"] + 0.05, (before, after)
    assert after["segmentation"] > before["segmentation"] + 0.15 and after["folds"] < 0.01, (before, after)
    assert min(after["global"], after["region"]) > 0.05, "both flows take part"
