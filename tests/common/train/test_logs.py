"""What a training tells: one line an epoch, no value where there is none, the weights at its end, curves, a picture."""

from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.train.checkpoints import BestCheckpoint
from common.train.logs import EpochLine, ValidationCurves, montage

SIZE = (12, 10, 8)


def trained(folder: Path, dice: float) -> None:
    """Two epochs of two iterations, validated after each with the given Dice."""
    network = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.25)
    scan = torch.rand(SIZE, generator=torch.Generator().manual_seed(0))
    disp = torch.zeros(3, *SIZE)
    disp[0] = 2 * torch.arange(SIZE[0]).flip(0).view(-1, 1, 1)  # folds everywhere
    validator = Engine(lambda engine, batch: [{"pred": disp, "warped": scan[None]}])

    validator.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(mean_dice=dice))

    def validate(engine: Engine) -> None:
        """As MONAI's evaluators begin at the epoch of the training."""
        validator.state.max_epochs, validator.state.epoch = engine.state.epoch, engine.state.epoch - 1
        validator.state.epoch_length, validator.state.iteration = 1, engine.state.epoch - 1
        validator.run([[{"image": torch.stack([scan.flip(0), scan])}]])

    ValidationCurves(str(folder / "tensorboard"), optimizer).attach(validator)
    BestCheckpoint(str(folder / "models"), network).attach(validator)
    trainer = Engine(lambda engine, number: [{"loss": float(number)}])
    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    EpochLine(validator, str(folder / "models")).attach(trainer)
    trainer.run([1, 2], max_epochs=2)


def test_a_line_an_epoch_and_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trained(tmp_path, 0.5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert [line.rpartition(",")[0] for line in lines[:2]] == [
        f"epoch {n} of 2: loss 1.5000, validation: mean_dice 0.5000" for n in (1, 2)
    ]
    file = tmp_path / "models" / "model.pt"
    assert lines[2] == f"weights of epoch 1 (mean_dice 0.5000); take them with --weights {file}" and file.is_file()


def test_no_value_where_there_are_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trained(tmp_path, float("nan"))
    text = capsys.readouterr().out
    assert "nan" not in text and "epoch 2 of 2: loss 1.5000, " in text
    assert "weights of epoch 2 (the last, as no validation pair has labels); take them with --weights " in text


def test_curves_and_a_picture(tmp_path: Path) -> None:
    trained(tmp_path, 0.5)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    curves = {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert {"validation/similarity_ncc", "validation/folding_pct", "validation/sdlogj", "learning_rate"} <= set(curves)
    assert curves["learning_rate"] == [(1, 0.25), (2, 0.25)]
    assert curves["validation/similarity_ncc"][0][1] == pytest.approx(1) and curves["validation/folding_pct"][0][1] > 99
    (picture, _) = found.Images("validation/fixed_moving_warped_difference")
    assert (picture.width, picture.height) == (4 * SIZE[0], 3 * SIZE[0])


def test_montage_shows_what_is_left() -> None:
    fixed = torch.zeros(SIZE)
    fixed[6, 5, 4] = 1
    same = montage(fixed, torch.zeros(SIZE), fixed)
    assert same.shape == (3 * 12, 4 * 12) and same[:, 36:].max() == 0 and same[:12, :12].sum() == 1
    assert montage(fixed, fixed, torch.zeros(SIZE))[:, 36:].sum() == 3
