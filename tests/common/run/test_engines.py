"""Weights, inferer, metric, one-sentence errors, checkpoints."""

import hashlib
import json
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.utils import set_determinism
from torch import Tensor, nn

from common import RegistrationWarning
from common.losses import lncc
from common.ops import warp
from common.run import engines, progress
from common.space.io import InputError
from common.train import checkpoints


class Dummy(nn.Module):
    """The smallest registration network: a convolution that gives three channels."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image)


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
    assert target.weights == {"file": str(tmp_path / "w.pt"), "sha256": digest}


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


def test_inferer_refines_for_the_pair(image: Tensor) -> None:
    moving, fixed = image.chunk(2, 1)
    with torch.no_grad():  # as engines call it
        disp = engines.RegistrationInferer(20, progress=False)(image, Still())
    before, after = float(lncc(moving, fixed)), float(lncc(warp(moving, disp), fixed))
    assert after < before - 0.1 and not disp.requires_grad
    assert float(disp[0, 0, 6:-6, 6:-6, 6:-6].mean()) == pytest.approx(1.0, abs=0.3)


def test_inferer_rejects_negative_steps() -> None:
    with pytest.raises(InputError, match="--refine_steps must be a whole number >= 0, got -1"):
        engines.RegistrationInferer(-1)
    with pytest.raises(InputError, match="--refine_steps must be a whole number >= 0, got abc"):
        engines.RegistrationInferer("abc")


# ---- metric ---------------------------------------------------------------------------------------------------------


def test_label_dice_value() -> None:
    """Label 1: 8 and 4 voxels, 4 in common, 2*4/12; label 2: equal, 1; label 3: two voxels, below the minimum."""
    fixed = torch.zeros(1, 1, 6, 6, 6)
    fixed[..., :2, :2, :2], fixed[..., 4:, 4:, 4:], fixed[..., 3, 0, :2] = 1, 2, 3
    warped = fixed.clone()
    warped[..., 0, :2, :2], warped[..., 3, 0, :2] = 0, 0
    metric, target = engines.LabelDice(minimum=2), torch.cat([fixed, fixed], 1)
    metric(warped, target)
    assert float(metric.aggregate()) == pytest.approx((2 / 3 + 1) / 2)
    metric(fixed, target)
    assert float(metric.aggregate()) == pytest.approx(((2 / 3 + 1) / 2 + 1) / 2)
    metric(torch.zeros_like(fixed), torch.zeros_like(target))  # no labels: does not count
    assert float(metric.aggregate()) == pytest.approx(((2 / 3 + 1) / 2 + 1) / 2)
    metric.reset()
    every = engines.LabelDice()
    every(warped, target)
    assert float(every.aggregate()) == pytest.approx((2 / 3 + 1 + 0) / 3)
    lacking = torch.cat([fixed, fixed * (fixed != 2)], 1)  # label 2 is not in the moving map: no fault of the warp
    every.reset()
    every(warped, lacking)
    assert float(every.aggregate()) == pytest.approx((2 / 3 + 0) / 2)


def test_label_dice_without_labels() -> None:
    """Scans without labels give nan instead of an error, also beside scans that have them."""
    metric = engines.label_dice_handler()
    labelled = {"warped_label": torch.ones(1, 4, 4, 4), "target_label": torch.ones(2, 4, 4, 4)}
    for output, expected in (([{"warped": 0}], float("nan")), ([labelled, {"warped": 0}], 1.0)):
        metric.reset()
        metric.update(metric._output_transform(output))
        assert float(metric.metric_fn.aggregate()) == pytest.approx(expected, nan_ok=True)


# ---- errors ---------------------------------------------------------------------------------------------------------


def run_python(code: str, root: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)


def test_one_sentence_errors(repository: Path) -> None:
    """One process for both: the hook is called by hand with the second error, then by Python with the first."""
    code = """
import sys
import warnings
from common.run.cli import one_sentence_errors
from common.space.io import InputError
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


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def training(folder: Path, epochs: int, *, write: bool = True) -> tuple[Engine, Dummy, list[float]]:
    """A tiny trainer with its network, and the values its only parameter takes."""
    net = Dummy()
    nn.init.zeros_(net.conv.bias)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    seen: list[float] = []

    def step(engine: Engine, x: Tensor) -> None:
        optimizer.zero_grad()
        (net(x).mean() - 5).square().backward()
        optimizer.step()
        seen.append(float(net.conv.bias[0]))

    engine = Engine(step)
    engine.state.max_epochs = epochs  # as MONAI's trainers do; the loader keeps it
    objects = {"model": net, "optimizer": optimizer}
    checkpoints.LastCheckpoint(str(folder), objects, device="cpu", write=write, seed=3).attach(engine)
    return engine, net, seen


def batches() -> list[Tensor]:
    return [torch.zeros(1, 2, 2, 2, 2)] * 2


def test_last_checkpoint_resumes_and_keeps_the_newest(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(0)
    whole, _, expected = training(tmp_path / "whole", 4)
    whole.run(batches(), max_epochs=4, epoch_length=2)
    assert capsys.readouterr().out == ""

    for epochs in (2, 4):
        engine, net, seen = training(tmp_path / "parts", epochs)
        engine.run(batches(), max_epochs=epochs, epoch_length=2)
        assert [path.name for path in (tmp_path / "parts").iterdir()] == [f"checkpoint_epoch={epochs}.pt"]
    assert f"going on from {tmp_path / 'parts' / 'checkpoint_epoch=2.pt'}" in capsys.readouterr().out
    assert len(seen) == 4 and seen == pytest.approx(expected[4:], abs=1e-6)
    state = torch.load(tmp_path / "parts" / "checkpoint_epoch=4.pt", weights_only=True)
    assert set(state) == {"model", "optimizer", "trainer"} and state["trainer"]["iteration"] == 8
    assert torch.equal(state["model"]["conv.bias"], net.conv.bias)


def test_resumed_run_draws_other_numbers(tmp_path: Path) -> None:
    """The same seed at the start would show the same pairs again after every stop."""
    drawn = []
    for epochs in (1, 2, 3):
        set_determinism(3)
        engine, _, _ = training(tmp_path, epochs)
        engine.add_event_handler(Events.ITERATION_STARTED(once=2 * epochs - 1), lambda _: drawn.append(torch.rand(1)))
        engine.run(batches(), max_epochs=epochs, epoch_length=2)
    set_determinism(None)
    assert len(drawn) == 3 and len({float(value) for value in drawn}) == 3


def test_changed_epochs_are_refused(tmp_path: Path) -> None:
    engine, _, _ = training(tmp_path, 2)
    engine.run(batches(), max_epochs=2, epoch_length=2)
    with pytest.raises(InputError, match=r"epoch=2.pt: --max_epochs 1 ends before this epoch; give another"):
        training(tmp_path, 1)
    engine, _, _ = training(tmp_path, 3)
    with pytest.raises(InputError, match="epoch=2.pt: has epochs of 2 iterations, not 1; give another --output_dir"):
        engine.run(batches(), max_epochs=3, epoch_length=1)


def test_other_processes_only_read(tmp_path: Path) -> None:
    engine, _, _ = training(tmp_path / "none", 1, write=False)
    engine.run(batches(), max_epochs=1, epoch_length=2)
    assert not (tmp_path / "none").exists()


def test_best_checkpoint_keeps_the_best_across_runs(tmp_path: Path) -> None:
    kept = []
    for value in (0.5, 0.4, 0.6, float("nan")):
        net = Dummy()
        nn.init.constant_(net.conv.bias, value)
        engine = Engine(lambda engine, batch: None)
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e, v=value: e.state.metrics.update(mean_dice=v))
        checkpoints.BestCheckpoint(str(tmp_path), net).attach(engine)
        engine.run([0], max_epochs=1)
        kept.append(float(torch.load(tmp_path / "model.pt", weights_only=True)["conv.bias"][0]))
    assert kept[:3] == pytest.approx([0.5, 0.5, 0.6])
    assert json.loads((tmp_path / "model.json").read_text())["epoch"] == 1


def test_prepare_pair_gives_image_twice() -> None:
    x = torch.rand(1, 2, 3, 3, 3)
    image, target = engines.prepare_pair({"image": x}, torch.device("cpu"))
    assert image is target and torch.equal(image, x)


def test_prepare_labelled_and_the_step() -> None:
    """The step hands scans and classes to the loss, and gradients reach the network that is validated."""
    batch = {"image": MetaTensor(torch.rand(1, 2, 3, 3, 3)), "label": MetaTensor(torch.ones(1, 2, 3, 3, 3))}
    image, target, args, kwargs = engines.prepare_labelled(batch, torch.device("cpu"))
    assert type(image) is Tensor and type(target) is Tensor and kwargs == {}

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(3.0))

        def forward_train(self, image: Tensor) -> Tensor:
            return self.scale * image

    class Loss(nn.Module):
        def forward(self, result: Tensor, image: Tensor, label: Tensor) -> Tensor:
            return (result - image).sum() + label.sum()

    network = Network()
    value = engines.step_loss(engines.TrainingStep(network, Loss())(image, *args), target)
    torch.testing.assert_close(value, 2 * image.sum() + 54)
    value.backward()
    torch.testing.assert_close(network.scale.grad, image.sum())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keep_memory() does something with glibc only")
def test_kept_memory_is_not_fetched_again() -> None:
    """Pages that the system has to hand out for ten tensors of 64 MiB, one after the other: 16384 for each; next to
    none once the memory has settled."""
    code = """if True:
        import resource, torch
        from common.run import engines
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10):
                torch.ones(2**24)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        engines.keep_memory()
        faults()
        print(faults())
    """
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 1000


@pytest.mark.skipif(sys.platform != "linux", reason="the names of a process's threads are read from /proc")
def test_threads_of_the_process_group_end_before_python_does(repository: Path) -> None:
    """Even when a finished workflow, whose parts name each other, has kept the group."""
    code = """if True:
        import atexit, os, pathlib, torch
        from common.run import engines
        def threads():
            print(sum("gloo" in path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")))
        atexit.register(threads)  # after what is registered later
        os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
        torch.cuda.is_available = lambda: False
        engines.init_processes()
        class Workflow: pass
        workflow = Workflow()
        workflow.itself = workflow
        workflow.network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
        torch.distributed.destroy_process_group()
        threads()
        del workflow
    """
    done = run_python(code, repository)
    assert done.returncode == 0, done.stderr
    kept, left = map(int, done.stdout.split())
    assert kept > 0 and left == 0


def test_tensorboard_parts() -> None:
    item = {"image": torch.arange(2.0)[:, None, None, None].expand(2, 3, 3, 3), "warped": torch.full((1, 3, 3, 3), 7.0)}
    fixed, moving = engines.fixed_and_moving([item])
    assert moving[0].unique().tolist() == [0] and fixed[0].unique().tolist() == [1]
    assert engines.warped_image([item])[0].unique().tolist() == [7]
