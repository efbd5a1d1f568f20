"""What a training keeps on disk: its whole state to go on from, and the best weights."""

import json
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd
from monai.handlers import CheckpointLoader
from monai.utils import set_determinism
from torch import nn

from common import InputError
from common.space.files import remove_leftovers, replaced


class LastCheckpoint:
    """Save the whole state of a training after every epoch, and go on from it when the run is started again.

    Network, optimizer, learning rate and epoch come from the checkpoint. What is random is drawn anew in every epoch,
    from a seed that depends on the epoch alone, so that a run that is stopped, at whatever moment, and started again
    has the numbers of one that was not.

    Args:
        folder: where checkpoint_epoch=N.pt is kept (the newest only).
        objects: what to save besides the trainer: model, optimizer, lr_scheduler.
        device: where to load tensors to.
        write: False on the processes that only read (rank > 0).
        seed: of the run.

    Raises:
        InputError: the epochs asked for end before the checkpoint, or have another length than those in it.
    """

    def __init__(
        self, folder: str, objects: dict[str, Any], *, device: torch.device | str, write: bool = True, seed: int = 0
    ) -> None:
        self.folder, self.objects, self.device = Path(folder), objects, device
        self.write, self.seed = write, seed

    def attach(self, engine: Engine) -> None:
        if found := list(self.folder.glob("checkpoint_epoch=*.pt")):
            self._resume(engine, max(found, key=_epoch))
        engine.add_event_handler(Events.EPOCH_STARTED, self._draw_anew)
        if self.write:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _draw_anew(self, engine: Engine) -> None:
        seed = self.seed + 1000 * (engine.state.epoch - 1)
        set_determinism(seed)
        set_rnd(getattr(engine.state.dataloader, "dataset", None), seed)  # MONAI's random transforms have their own
        engine.set_data(engine.state.dataloader)

    def _resume(self, engine: Engine, path: Path) -> None:
        epoch, asked = _epoch(path), {}
        anew = "give another --output_dir to begin anew"
        if engine.state.max_epochs is not None and engine.state.max_epochs < epoch:
            raise InputError(f"{path}: --max_epochs {engine.state.max_epochs} ends before this epoch; {anew}")
        if engine.state.max_epochs == epoch:
            print(f"{path}: all {epoch} epochs are done; a larger --max_epochs goes on", flush=True)
        else:
            print(f"going on from {path}, with its learning rate", flush=True)

        def check(engine: Engine) -> None:
            if asked["length"] not in (None, engine.state.epoch_length):
                lengths = f"has epochs of {engine.state.epoch_length} iterations, not {asked['length']}"
                raise InputError(f"{path}: {lengths}; {anew}")

        engine.add_event_handler(Events.STARTED, lambda e: asked.update(length=e.state.epoch_length))
        everything = self.objects | {"trainer": engine}
        CheckpointLoader(str(path), everything, map_location=torch.device(self.device)).attach(engine)
        engine.add_event_handler(Events.STARTED, check)

    def _save(self, engine: Engine) -> None:
        everything = self.objects | {"trainer": engine}
        state = {name: getattr(item, "module", item).state_dict() for name, item in everything.items()}
        path = self.folder / f"checkpoint_epoch={engine.state.epoch}.pt"
        self.folder.mkdir(parents=True, exist_ok=True)
        replaced(path, lambda partial: torch.save(state, partial))
        remove_leftovers(self.folder)
        for older in self.folder.glob("checkpoint_epoch=*.pt"):
            if older != path:
                older.unlink()


def _epoch(path: Path) -> int:
    return int(path.stem.split("=")[1])


class BestCheckpoint:
    """Keep the weights of the best validation as model.pt, a plain state dict, also across resumed runs.

    model.json beside it says which epoch they are from and the value of the key metric. Without a value (scans without
    labels) the last weights are kept.

    Args:
        folder: where model.pt and model.json go.
        network: the network, or its DistributedDataParallel wrapper.
        metric: name of the key metric.
    """

    def __init__(self, folder: str, network: nn.Module, metric: str = "mean_dice") -> None:
        self.folder, self.network, self.metric = Path(folder), network, metric

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self._keep)

    def _keep(self, engine: Engine) -> None:
        value = float(engine.state.metrics.get(self.metric, float("nan")))
        note = self.folder / "model.json"
        best = json.loads(note.read_text())[self.metric] if note.exists() else None  # None: no value yet
        if best is not None and not value > best:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = getattr(self.network, "module", self.network).state_dict()
        for name, weight in state.items():  # those trained on a GPU are loaded where there is none
            state[name] = weight.cpu()
        replaced(self.folder / "model.pt", lambda partial: torch.save(state, partial))
        told = {"epoch": engine.state.epoch, self.metric: value if value == value else None}
        replaced(note, lambda partial: partial.write_text(json.dumps(told) + "\n", encoding="utf-8"))
