"""CUDA graphs: when a call is recorded and when it is not, by a stand-in on the CPU; on a GPU the real ones."""

import sys

import pytest
import torch
from graph_stand_in import record
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import common.refine
from common import graphs
from common.graphs import Graphed, modules_state
from common.losses import RegistrationLoss
from common.refine import Guide, refine
from common.run import progress
from common.run.engines import RegistrationInferer
from common.train.synthesis import KnownFlowLoss
from sacb_net import SACBNet

CPU = torch.device("cpu")


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The CPU as a device with graphs; how many operations each recording has."""
    made: list[int] = []

    def counted(*given):
        results, replay = record(*given)
        made.append(len(replay.__self__.calls))
        return results, replay

    monkeypatch.setattr(graphs, "possible", lambda device: True)
    monkeypatch.setattr(graphs, "record", counted)
    return made


class Counted(nn.Module):
    """How often Python comes by."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls, self._hidden = nn.Conv3d(2, 3, 3, padding=1), 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self._calls = getattr(self, "_calls", 0) + 1
        return self.layer(x).sigmoid()


def images(count: int, size: tuple[int, ...] = (1, 2, 6, 5, 4)) -> list[Tensor]:
    return [torch.rand(size) for _ in range(count)]


@torch.no_grad()
def test_records_the_second_call_and_replays(recording: list[int]) -> None:
    """The same bits; results stay what they were; weights that change in place are seen."""
    net, told = Counted(), []
    graphed = Graphed(net, CPU, state=lambda: modules_state(net))
    given = images(4)
    found = []
    for image in given:
        found.append(graphed(image))
        told.append(graphed.told)
    assert told == ["run as written: the first of its kind", *["replayed"] * 3]
    assert net._calls == 2 and len(recording) == 1
    for image, result in zip(given, found):
        assert torch.equal(result, net(image))
    net.layer.bias.add_(1.0)
    assert torch.equal(graphed(given[0]), net(given[0])) and len(recording) == 1


@torch.no_grad()
def test_kinds(recording: list[int]) -> None:
    """Size, layout, type, weights at another place, plain attributes: each is a kind of its own; two are kept."""
    net = Counted()
    graphed = Graphed(net, CPU, state=lambda: modules_state(net))
    first, other = torch.rand(1, 2, 6, 5, 4), torch.rand(1, 2, 4, 5, 6)

    def twice(x: Tensor) -> None:
        for _ in range(2):
            torch.testing.assert_close(graphed(x), net(x))

    twice(first)
    twice(other)
    twice(first.contiguous(memory_format=torch.channels_last_3d))
    assert len(recording) == 3 and len(graphed._graphs) == graphs.KEPT
    graphed(first)
    assert len(recording) == 4, "the first one has been dropped, and is recorded at once"
    net._hidden = 1
    graphed(first)
    assert len(recording) == 4
    net.calls = 1
    twice(first)
    assert len(recording) == 5
    net.layer.weight = nn.Parameter(net.layer.weight.clone())
    twice(first)
    assert len(recording) == 6
    with torch.enable_grad():
        twice(first.clone())
    assert len(recording) == 7
    with torch.autocast("cpu", torch.bfloat16):
        twice(first)
    assert len(recording) == 8


def test_runs_as_written_what_cannot_be_recorded(recording: list[int]) -> None:
    def waits(x: Tensor) -> Tensor:
        return x * float(x.sum())

    graphed, (image,) = Graphed(waits, CPU), images(1)
    for _ in range(3):
        assert torch.equal(graphed(image), waits(image))
    assert graphed.told.startswith("run as written: operation not permitted") and not recording


def test_off_on_a_cpu_or_when_asked(recording: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    (image,) = images(1)
    switched_off = Graphed(torch.sin, CPU, on=False)
    for _ in range(3):
        assert torch.equal(switched_off(image), image.sin()) and switched_off.told == "off"
    monkeypatch.undo()
    on_a_cpu = Graphed(torch.sin, CPU)
    for _ in range(3):
        assert torch.equal(on_a_cpu(image), image.sin()) and on_a_cpu.told == "off"


class Copied(TorchDispatchMode):
    """Refuses tensors that are made of numbers of the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ != "lift_fresh"
        return func(*args, **(kwargs or {}))


def test_what_says_that_it_is_capturable_waits_for_nothing() -> None:
    """Fake tensors have no values: whatever needs one fails."""
    nets = SACBNet(), SACBNet(kmeans_iterations=None)
    assert [net.capturable for net in nets] == [True, False]
    losses = (RegistrationLoss(folding=1.0, edges=1.0), RegistrationLoss("mse"), KnownFlowLoss())
    with FakeTensorMode(allow_non_fake_inputs=True):
        image, target = torch.empty(1, 2, 32, 32, 32), torch.empty(1, 5, 32, 32, 32)
        for loss, against in zip(losses, (image, image, target)):
            assert loss.capturable
            weights = {name: torch.empty(p.shape).requires_grad_() for name, p in nets[0].named_parameters()}
            with Copied():
                disp = torch.func.functional_call(nets[0], weights, (image,))
                torch.autograd.grad(loss(disp, against), list(weights.values()))


# ---- a cohort, the refinement ---------------------------------------------------------------------------------------


class Shift(nn.Module):
    """A displacement, and how often it was asked for."""

    capturable = True

    def __init__(self) -> None:
        super().__init__()
        self.layer, self._calls = nn.Conv3d(2, 3, 3, padding=1), 0

    def forward(self, image: Tensor) -> Tensor:
        self._calls += 1
        return self.layer(image)


@torch.no_grad()
def test_cohort_of_one_size(recording: list[int]) -> None:
    """The network of all pairs but the first two is replayed, and the report of each says what was."""
    net, inferer = Shift(), RegistrationInferer(cuda_graphs=True)
    progress.take()
    told = []
    for image in images(4, (1, 2, 8, 8, 8)):
        assert torch.equal(inferer(image, net), net.layer(image))
        told.append(progress.take()[1]["cuda_graph"])
    assert told == ["run as written: the first of its kind", *["replayed"] * 3] and net._calls == 2
    for network, given in ((net, RegistrationInferer()), (nn.Identity(), inferer)):
        for image in images(3, (1, 2, 8, 8, 8)):
            given(image, network)
        assert "cuda_graph" not in progress.take()[1]
    assert len(recording) == 1


@pytest.fixture
def capturable_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam as on a GPU, where it counts its steps in a tensor; torch allows that on accelerators only."""
    original = common.refine.adam
    allowed = lambda *given, **options: ["cpu"]  # noqa: E731
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_get_capturable_supported_devices", allowed)
    capturable = lambda *given, **options: original(*given, **(options | {"capturable": True}))  # noqa: E731
    monkeypatch.setattr(common.refine, "adam", capturable)


@pytest.mark.parametrize("similarity", ["lncc", "mind"])
@pytest.mark.parametrize("guided", [False, True])
def test_refinement(similarity: str, guided: bool, recording: list[int], capturable_adam: None) -> None:
    """Steps that are replayed are the steps as written; each stage is one recording."""
    image, disp = torch.rand(1, 2, 16, 16, 16), torch.zeros(1, 3, 16, 16, 16)
    points = torch.rand(5, 3) * 12 + 2
    guide = Guide(points, points + 1, torch.eye(3), 0.1) if guided else None
    seen: list[tuple[int, int]] = []
    options = {"similarity": similarity, "guide": guide}
    found = refine(disp, image, 10, progress=lambda *done: seen.append(done), graphs=True, **options)
    assert len(recording) == (2 if similarity == "lncc" else 1) and seen == [(n, 10) for n in range(1, 11)]
    written = refine(disp, image, 10, progress=False, graphs=False, **options)
    assert len(recording) <= 2
    torch.testing.assert_close(found, written, rtol=0, atol=1e-5)
    assert found.abs().max() > 0.1


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@torch.no_grad()
def test_network_on_gpu() -> None:
    net = SACBNet().cuda()
    graphed = Graphed(net, torch.device("cuda"), state=lambda: modules_state(net))
    given = [torch.rand(1, 2, 32, 48, 32, device="cuda") for _ in range(4)]
    found = [graphed(image) for image in given]
    assert graphed.told == "replayed"
    for image, result in zip(given, found):
        assert torch.equal(result, net(image))


@pytest.mark.gpu
def test_refinement_on_gpu() -> None:
    image, disp = torch.rand(1, 2, 32, 32, 32).cuda(), torch.zeros(1, 3, 32, 32, 32).cuda()
    for similarity in ("lncc", "mind"):
        found, written = (refine(disp, image, 10, similarity=similarity, graphs=on) for on in (True, False))
        torch.testing.assert_close(found, written, rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_what_waits_runs_as_written_on_gpu() -> None:
    """And leaves nothing behind: random numbers, and a recording of something else."""
    image = torch.rand(8, device="cuda")
    graphed = Graphed(lambda x: x * float(x.sum()), image.device)
    for _ in range(3):
        assert torch.equal(graphed(image), image * float(image.sum()))
    assert graphed.told.startswith("run as written")
    assert torch.rand(3, device="cuda").isfinite().all()
    other = Graphed(torch.sin, image.device)
    for _ in range(3):
        assert torch.equal(other(image), image.sin())
    assert other.told == "replayed"
