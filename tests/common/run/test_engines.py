"""Weights, inferer, metric, one-sentence errors, checkpoints."""

import hashlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from forks import PATIENCE
from networks import Dummy
from torch import Tensor, nn

from common import InputError, RegistrationWarning
from common.fields import compose
from common.losses import lncc
from common.ops import warp
from common.run import engines, progress


class Still(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return torch.zeros(len(image), 3, *image.shape[2:], dtype=torch.float16)


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_load_weights_that_fit(tmp_path: Path, wrapped: bool) -> None:
    source, target = Dummy(), Dummy()
    state = source.state_dict()
    torch.save({"model": state} if wrapped else state, tmp_path / "w.pt")
    assert engines.load_weights(target, tmp_path / "w.pt") is target
    assert torch.equal(target.conv.weight, source.conv.weight)
    digest = hashlib.sha256((tmp_path / "w.pt").read_bytes()).hexdigest()
    assert target.weights == {"file": str(tmp_path / "w.pt"), "sha256": digest, "as_published": None}


def test_no_path_leaves_the_network() -> None:
    net = Dummy()
    before = net.conv.weight.clone()
    for nothing in (None, ""):
        assert torch.equal(engines.load_weights(net, nothing).conv.weight, before)


def test_weights_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    torch.save(Dummy(4).state_dict(), tmp_path / "shape.pt")
    torch.save({"other.weight": torch.zeros(1)}, tmp_path / "names.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("no weights")
    cases = {
        "shape.pt": "do not fit the network Dummy, first at 'conv.weight'",
        "names.pt": "do not fit the network Dummy, first at 'conv.bias'",
        "list.pt": "not a file of weights",
        "text.pt": "not a file of weights",
        "none.pt": "no such file",
    }
    for name, words in cases.items():
        net = Dummy()
        before = net.conv.weight.clone()
        with pytest.raises(InputError, match=words) as caught:
            engines.load_weights(net, tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(caught.value)
        assert torch.equal(net.conv.weight, before)


# ---- inferer --------------------------------------------------------------------------------------------------------


@pytest.fixture
def image() -> Tensor:
    """A blurred noise scan, and the same one shifted by a voxel."""
    fixed = nn.functional.avg_pool3d(torch.rand(1, 1, 24, 24, 24), 5, stride=1, padding=2)
    fixed = (fixed - fixed.min()) / (fixed.max() - fixed.min())
    return torch.cat([fixed.roll(1, 2), fixed], 1)


def test_inferer_without_refinement_is_the_network(image: Tensor) -> None:
    net = Dummy()
    torch.testing.assert_close(engines.RegistrationInferer()(image, net), net(image))
    assert engines.RegistrationInferer()(image, Still()).dtype == torch.float32


def test_inferer_registers_what_earlier_passes_have_warped(image: Tensor) -> None:
    seen = []

    def half(pair: Tensor) -> Tensor:
        """Half a voxel of the one that the fixture's scans are apart; of two channels a scan."""
        seen.append(pair)
        return torch.tensor([0.5, 0.0, 0.0]).view(1, 3, 1, 1, 1).expand(1, 3, *pair.shape[2:])

    image = image.repeat_interleave(2, 1) * torch.tensor([1.0, 2.0, 1.0, 2.0]).view(1, 4, 1, 1, 1)
    disp = engines.RegistrationInferer(passes=2)(image, half)
    moving, fixed = image.chunk(2, 1)
    torch.testing.assert_close(disp, torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1, 1).expand_as(disp))
    torch.testing.assert_close(warp(moving, disp)[:, :, :-1], fixed[:, :, :-1])
    assert torch.equal(seen[0], image) and torch.equal(seen[1], torch.cat([warp(moving, half(image)), fixed], 1))
    for wrong in (0, "two", 1.5, True):
        with pytest.raises(InputError, match=f"--passes must be a whole number >= 1, got {wrong}"):
            engines.RegistrationInferer(passes=wrong)


def test_inferer_tells_what_the_last_pass_warns_of(image: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a further pass has cured is none of the result's."""
    calls, notes = [], []

    def warning(pair: Tensor) -> Tensor:
        calls.append(len(calls))
        warnings.warn(f"pass {len(calls)}", RegistrationWarning, stacklevel=2)
        return torch.zeros(1, 3, *pair.shape[2:])

    monkeypatch.setattr(progress, "note", notes.append)
    engines.RegistrationInferer(passes=3)(image, warning)
    assert len(calls) == 3 and notes == ["pass 3"]


def test_network_sees_no_hole_and_its_field_goes_on_across_it(image: Tensor) -> None:
    """Which is then that of the intact pair around it, and smooth inside."""
    image = 0.1 + 0.9 * image
    mask = torch.ones_like(image)
    mask[:, 1, 8:16, 8:16, 8:16] = 0
    seen = []

    def network(pair: Tensor) -> Tensor:
        seen.append(pair)
        disp = torch.ones(1, 3, *pair.shape[2:])
        disp[:, :, 10:14, 10:14, 10:14] = 7.0  # what a network makes up inside
        return disp

    disp = engines.RegistrationInferer()(image * mask, network, mask=mask)
    assert float(seen[0][:, 1, 8:16, 8:16, 8:16].min()) > 0 and torch.equal(seen[0][:, 0], image[:, 0])
    torch.testing.assert_close(disp, torch.ones_like(disp))


def test_inferer_refines_for_the_pair(image: Tensor) -> None:
    moving, fixed = image.chunk(2, 1)
    with torch.no_grad():  # as engines call it
        disp = engines.RegistrationInferer(20, progress=False)(image, Still())
    before, after = float(lncc(moving, fixed)), float(lncc(warp(moving, disp), fixed))
    assert after < before - 0.1 and not disp.requires_grad
    assert float(disp[0, 0, 6:-6, 6:-6, 6:-6].mean()) == pytest.approx(1.0, abs=0.3)


def test_from_a_start_the_network_registers_what_is_left(image: Tensor) -> None:
    """Without steps it sees the moving scan as the start has warped it; with steps, they alone go on."""
    seen, start = [], torch.zeros(1, 3, *image.shape[2:])
    start[:, 0] = 1.0

    def network(pair: Tensor) -> Tensor:
        seen.append(pair)
        return torch.full((1, 3, *pair.shape[2:]), 0.5)

    disp = engines.RegistrationInferer()(image, network, start=start)
    torch.testing.assert_close(seen[0], torch.cat([warp(image[:, :1], start), image[:, 1:]], 1))
    torch.testing.assert_close(disp, start + 0.5)
    found = engines.RegistrationInferer(4, progress=False)(image, network, start=start)
    assert len(seen) == 1 and float((found - start).abs().mean()) < 0.2, "0.1 voxels a step, from the start on"


def test_midspace_is_symmetric(image: Tensor) -> None:
    """Swapped scans give the inverse, of a network that favours one direction, masks and points included."""

    def network(pair: Tensor) -> Tensor:
        moving, fixed = pair.chunk(2, 1)
        push = (moving - fixed).mean(dim=(2, 3, 4), keepdim=True) + 0.3
        wave = torch.sin(torch.linspace(0, torch.pi, pair.shape[2])).view(1, 1, -1, 1, 1)
        return torch.cat([push.sign() * 2 * wave.expand_as(moving), 0.4 * wave.expand_as(moving), 0 * moving], 1)

    inferer = engines.RegistrationInferer(midspace=True)
    pair = torch.cat([image[:, :1], 0.5 * image[:, 1:]], 1)
    there, back = inferer(pair, network), inferer(torch.cat(pair.chunk(2, 1)[::-1], 1), network)
    inner = (slice(None), slice(None), *[slice(4, -4)] * 3)
    assert float(compose(there, back).norm(dim=1)[inner[1:]].max()) < 0.05
    one_way = [engines.RegistrationInferer()(x, network) for x in (pair, torch.cat(pair.chunk(2, 1)[::-1], 1))]
    assert float(compose(*one_way).norm(dim=1)[inner[1:]].max()) > 0.3


def test_auto_compares_what_the_scans_have_in_common(image: Tensor) -> None:
    """Dark for bright is another contrast: by MIND; else by LNCC."""
    moving, fixed = image.chunk(2, 1)
    for scan, similarity in ((moving, "lncc"), (1.05 - moving, "mind")):
        pair = torch.cat([scan, fixed], 1)
        by_word, found = (
            engines.RegistrationInferer(3, similarity=word, progress=False)(pair, Still())
            for word in (similarity, "auto")
        )
        assert torch.equal(found, by_word) and found.any()


def test_auto_looks_once_a_pair(image: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions compare the same, whatever is left to find in each."""
    answers = iter((0.9, 0.0))
    monkeypatch.setattr(engines, "tissue_correlation", lambda *given: next(answers))
    by_word, found = (
        engines.RegistrationInferer(3, similarity=word, midspace=True, progress=False)(image, Still())
        for word in ("lncc", "auto")
    )
    assert torch.equal(found, by_word) and next(answers) == 0.0, "the second answer was not asked for"


def test_inferer_rejects_negative_steps() -> None:
    with pytest.raises(InputError, match="--refine_steps must be a whole number >= 0, got -1"):
        engines.RegistrationInferer(-1)
    with pytest.raises(InputError, match="--refine_steps must be a whole number >= 0, got abc"):
        engines.RegistrationInferer("abc")


def test_guide_needs_steps() -> None:
    with pytest.raises(InputError, match="--guide: points guide the refinement, which needs --refine_steps, as 50"):
        engines.RegistrationInferer(guide=0.1)
    with pytest.raises(InputError, match="--guide: points guide the refinement"):  # of one pair of a table
        engines.RegistrationInferer()(torch.rand(1, 2, 8, 8, 8), Still(), guide=0.1)


# ---- errors ---------------------------------------------------------------------------------------------------------


def run_python(code: str, root: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=PATIENCE)


def test_one_sentence_errors(repository: Path) -> None:
    """One process for both: the hook is called by hand with the second error, then by Python with the first."""
    code = """
import sys
import warnings
from common.run.cli import one_sentence_errors
from common import InputError
one_sentence_errors()
one_sentence_errors()  # twice changes nothing
try:
    1 / 0
except ZeroDivisionError:
    sys.excepthook(*sys.exc_info())
print("-----", file=sys.stderr)
try:
    try:
        raise InputError("scan.nii.gz: is constant")
    except InputError as error:
        raise RuntimeError("applying transform <x>") from error
except RuntimeError as error:
    raise RuntimeError("Failed to instantiate")
"""
    done = run_python(code, repository)
    other, _, ours = done.stderr.partition("-----\n")
    assert "Traceback" in other and "ZeroDivisionError" in other
    assert ours == "error: scan.nii.gz: is constant\n" and done.returncode == 1
