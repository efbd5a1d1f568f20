"""What a training tells its user: a line an epoch, curves and a picture in TensorBoard, and at the end where it is."""

import json
import math
import time
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from torch import Tensor

from common.quality.metrics import ncc, regularity
from common.run import progress


class EpochLine:
    """Print one line for every epoch, with the time left by the pace so far, and at the end the file of weights with
    the option that takes it.

    Args:
        validator: whose metrics are told; it must have run when this handler does.
        folder: of model.pt and model.json, as `BestCheckpoint` keeps them.
        metric: name of the key metric.
    """

    def __init__(self, validator: Engine, folder: str, metric: str = "mean_dice") -> None:
        self.validator, self.folder, self.metric = validator, Path(folder), metric
        self.losses: list[float] = []
        self.begun: float | None = None  # when the first epoch of this process was

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._keep)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._tell)
        engine.add_event_handler(Events.COMPLETED, self._end)

    def _begin(self, engine: Engine) -> None:
        self.started = time.time()
        if self.begun is None:
            self.begun, self.first = self.started, engine.state.epoch
        self.losses.clear()

    def _keep(self, engine: Engine) -> None:
        self.losses.append(float(engine.state.output[0]["loss"]))

    def _tell(self, engine: Engine) -> None:
        loss = sum(self.losses) / len(self.losses)
        line = f"epoch {engine.state.epoch} of {engine.state.max_epochs}: loss {loss:.4f}"
        if self.validator.state.epoch == engine.state.epoch:
            found = {name: float(value) for name, value in self.validator.state.metrics.items()}
            told = [f"{name} {value:.4f}" for name, value in found.items() if math.isfinite(value)]
            line += f", validation: {', '.join(told)}" if told else ""
        now, done = time.time(), engine.state.epoch - self.first + 1
        left = (now - self.begun) / done * (engine.state.max_epochs - engine.state.epoch)
        rest = f", about {progress.duration(left)} left" if left >= 1 else ""
        progress.tell(f"{line}, {now - self.started:.1f} s{rest}")

    def _end(self, engine: Engine) -> None:
        file, note = self.folder / "model.pt", self.folder / "model.json"
        if not file.is_file():
            progress.tell("no weights were kept: no validation has run; --val_interval says how often it does")
            return
        told = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        value = told.get(self.metric)
        what = "the last, as no validation pair has labels" if value is None else f"{self.metric} {value:.4f}"
        progress.tell(f"weights of epoch {told.get('epoch', '?')} ({what}); take them with --weights {file}")


class ValidationCurves:
    """Similarity, folding and smoothness of the validation pairs, the learning rate, and a picture, in TensorBoard.

    The similarity is the correlation inside the fixed foreground, smoothness SDlogJ. The picture has, for the first
    pair, a row a direction: fixed, moving and warped scan, and the difference that is left.

    Args:
        log_dir: of TensorBoard.
        optimizer: whose learning rate is told.
    """

    def __init__(self, log_dir: str, optimizer: torch.optim.Optimizer) -> None:
        self.log_dir, self.optimizer, self.rows = log_dir, optimizer, []
        self.shown: Tensor | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._keep)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _begin(self, engine: Engine) -> None:
        self.rows, self.shown = [], None

    def _keep(self, engine: Engine) -> None:
        for batch, output in zip(engine.state.batch, engine.state.output):
            moving, fixed = torch.as_tensor(batch["image"]).cpu().float().chunk(2)
            warped = torch.as_tensor(output["warped"]).cpu().float()
            inside = fixed[0] > 0
            found = regularity(torch.as_tensor(output["pred"]).cpu().float()[None], inside if inside.any() else None)
            self.rows.append({"similarity_ncc": ncc(warped[0], fixed[0], inside)} | found)
            if self.shown is None:
                self.shown = montage(fixed[0], moving[0], warped[0])

    def _write(self, engine: Engine) -> None:
        from torch.utils.tensorboard import SummaryWriter

        epoch = engine.state.epoch
        with SummaryWriter(self.log_dir) as writer:
            for name in self.rows[0] if self.rows else ():
                values = [row[name] for row in self.rows if math.isfinite(row[name])]
                if values:
                    writer.add_scalar(f"validation/{name}", sum(values) / len(values), epoch)
            writer.add_scalar("learning_rate", self.optimizer.param_groups[0]["lr"], epoch)
            if self.shown is not None:
                writer.add_image("validation/fixed_moving_warped_difference", self.shown, epoch, dataformats="HW")


def montage(fixed: Tensor, moving: Tensor, warped: Tensor) -> Tensor:
    """Middle slices (H, W) of three scans (I, J, K) in [0, 1], a row a direction: fixed, moving, warped, difference."""
    side = max(fixed.shape)
    rows = []
    for axis in range(3):
        at = fixed.shape[axis] // 2
        planes = [scan.select(axis, at).T.flip(0) for scan in (fixed, moving, warped)]
        planes.append((planes[2] - planes[0]).abs())
        framed = []
        for plane in planes:
            frame = torch.zeros(side, side)
            top, left = ((side - n) // 2 for n in plane.shape)
            frame[top : top + plane.shape[0], left : left + plane.shape[1]] = plane
            framed.append(frame)
        rows.append(torch.cat(framed, 1))
    return torch.cat(rows).clamp(0, 1)
