"""A training goes on from its last checkpoint, and keeps its best weights."""

import json
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from monai.utils import set_determinism
from networks import Dummy
from torch import Tensor, nn

from common import InputError
from common.train import checkpoints


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
