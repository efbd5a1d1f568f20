"""What only training puts into MONAI's engines: the step, the key metric, the bars, the processes."""

import atexit
import copy
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import ignite.distributed
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.data import DistributedSampler
from monai.engines import IterationEvents, SupervisedTrainer
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric
from monai.utils import CommonKeys as Keys
from torch import Tensor, nn

from common import InputError, graphs
from common.graphs import Graphed, modules_state
from common.ops import plain
from common.quality.metrics import label_overlap, mean_over_labels
from common.run import progress
from common.run.engines import rank_device
from common.run.machine import keep_memory
from common.run.processes import leave_group

TORCHRUN = "torchrun --standalone --nproc_per_node=GPUS"
__all__ = ["keep_memory", "leave_group", "rank_device"]  # which the configs name as part of this module


class LabelDice(CumulativeIterationMetric):
    """Mean Dice over the labels of each pair, as evaluate measures it.

    Takes the warped label map (1, I, J, K), and fixed and moving label map as target (2, I, J, K).

    Args:
        minimum: labels of at most this many voxels in the fixed map are left out, and those that the moving map lacks.
    """

    def __init__(self, minimum: int = 0) -> None:
        super().__init__()
        self.minimum = minimum

    def _compute_tensor(self, y_pred: Tensor, y: Tensor) -> Tensor:
        target, warped = (torch.as_tensor(x).cpu().round().long() for x in (y, y_pred))
        scores = [label_overlap(f, w, m, minimum=self.minimum) for (f, m), (w,) in zip(target, warped)]
        return torch.tensor([[mean_over_labels(score, "dice")] for score in scores])

    def aggregate(self) -> Tensor:
        """Mean over the pairs so far, nan where no pair has labels."""
        return torch.as_tensor(self.get_buffer()).float().nanmean()


def prepare_pair(batch: dict, device: torch.device, non_blocking: bool = False, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Input and target of a pair are the same packed image: the loss warps the one half onto the other."""
    image = plain(batch["image"]).to(device, non_blocking=non_blocking, **kwargs)
    return image, image


def prepare_labelled(batch: dict, device: torch.device, non_blocking: bool = False, **kwargs: Any) -> tuple:
    """Packed image and packed classes ("label" (B, 2, I, J, K), -1 for unknown) of a pair, for a `TrainingStep`."""
    both = (plain(batch[key]) for key in ("image", "label"))
    image, label = (x.to(device, non_blocking=non_blocking, **kwargs) for x in both)
    return image, label, (label,), {}


class TrainingStep(nn.Module):
    """loss(network.forward_train(image), image, label): what a trainer runs of a method with more than one output.

    `label` is what `prepare_batch` gives beside the image, None for `prepare_pair`.

    A module of its own, so that DistributedDataParallel sees the whole step, while `network` stays what is validated
    and saved.
    """

    def __init__(self, network: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        return self.loss(self.network.forward_train(image), image, label)


def step_loss(value: Tensor, label: Tensor) -> Tensor:
    """The loss function of a trainer that runs a `TrainingStep`: its output is the loss already."""
    return value


class GraphedStep:
    """A trainer's `iteration_update`: MONAI's own, with the forward and backward pass replayed as a CUDA graph.

    On a GPU, if network and loss say that they are `capturable`, without mixed precision and accumulated gradients, and
    in one process; in any other case it is MONAI's own step. The first line of the training says which. Of every image
    size the first step runs as written. What clips gradients, the optimizer, the learning rate and what is saved are
    outside of the graph, as they were: some ten launches.

    Args:
        on: False takes MONAI's own step.
    """

    def __init__(self, on: bool = True) -> None:
        self.on = on
        self._graphed: Graphed | None = None
        self._said = False

    def __call__(self, engine: SupervisedTrainer, batch: dict) -> dict:
        reason = self._why_not(engine)
        if not self._said and engine.state.device.type == "cuda":
            how = f"no CUDA graph: {reason}" if reason else "each step after the first as a CUDA graph"
            progress.tell(how)
            self._said = True
        if reason:
            return engine._iteration(engine, batch)
        prepared = engine.prepare_batch(batch, engine.state.device, engine.non_blocking, **engine.to_kwargs)
        image, target = plain(prepared[0]), plain(prepared[1])
        engine.state.output = {Keys.IMAGE: image, Keys.LABEL: target}
        engine.network.train()
        learned = [p for p in engine.network.parameters() if p.requires_grad]
        if self._graphed is None:
            self._graphed = self._forward_and_backward(engine, learned)
        loss, pred, *slopes = self._graphed(image, target)
        engine.state.output |= {Keys.PRED: pred.clone(), Keys.LOSS: loss.clone()}  # the next replay writes there
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        for parameter, slope in zip(learned, slopes):
            parameter.grad = slope
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        engine.optimizer.step()
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output

    def _why_not(self, engine: SupervisedTrainer) -> str:
        if not self.on:
            return "switched off"
        if not graphs.possible(engine.state.device):
            return "not on a GPU"
        if engine.amp or engine.accumulation_steps > 1 or engine.compile:
            return "mixed precision, accumulated gradients or a compiled network"
        for part in (engine.network, engine.loss_function):
            if not getattr(part, "capturable", False):
                return f"{type(part).__name__} does not say that it can be captured"
        return ""

    @staticmethod
    def _forward_and_backward(engine: SupervisedTrainer, learned: list[nn.Parameter]) -> Graphed:
        network, loss_function = engine.network, engine.loss_function

        def run(image: Tensor, target: Tensor) -> tuple[Tensor | None, ...]:
            pred = engine.inferer(image, network)
            loss = loss_function(pred, target).mean()
            slopes = torch.autograd.grad(loss, learned, allow_unused=True)
            return loss.detach(), pred.detach(), *slopes  # with a graph of theirs, they would keep its streams

        state = lambda: modules_state(network, loss_function)  # noqa: E731
        return Graphed(run, engine.state.device, state=state, copy=False)


def label_dice_handler(minimum: int = 0, *, of: str | None = None) -> IgniteMetricHandler:
    """Key metric of the validation: mean label Dice of "warped_label" against "target_label"; nan without labels.

    Args:
        minimum: of `LabelDice`.
        of: only of the pairs whose output has this "set", where several sets are validated on; None of all.
    """

    def chosen(output: list[dict]) -> tuple[list[Tensor], list[Tensor]]:
        return _warped_and_target([item if of in (None, item.get("set")) else {} for item in output])

    return IgniteMetricHandler(metric_fn=LabelDice(minimum), output_transform=chosen)


def _warped_and_target(output: list[dict]) -> tuple[list[Tensor], list[Tensor]]:
    """What `LabelDice` takes; maps without any label for a pair that has none."""
    empty = torch.zeros(2, 1, 1, 1)
    labelled = [
        item if "warped_label" in item else {"warped_label": empty[:1], "target_label": empty} for item in output
    ]
    return [item["warped_label"] for item in labelled], [item["target_label"] for item in labelled]


def fixed_and_moving(batch: list[dict]) -> tuple[list[Tensor], list[Tensor]]:
    """For TensorBoard: the two scans of the packed image, fixed as image, moving as label."""
    halves = [torch.as_tensor(item["image"]).chunk(2) for item in batch]
    return [fixed for _, fixed in halves], [moving for moving, _ in halves]


def warped_image(output: list[dict]) -> list[Tensor]:
    """For TensorBoard: the warped moving scans."""
    return [torch.as_tensor(item["warped"]) for item in output]


class EpochBar:
    """Progress bar over the iterations of an epoch, in training with the loss; in a terminal only, not in a log."""

    def __init__(self, name: str = "train") -> None:
        self.name = name

    def attach(self, engine: Engine) -> None:
        if progress.quiet() or not sys.stderr.isatty():
            return
        bar = ProgressBar(desc=self.name, persist=False)
        bar.attach(engine, output_transform=self._shown)

    @staticmethod
    def _shown(output: list[dict]) -> dict[str, float]:
        return {"loss": round(float(output[0]["loss"]), 4)} if "loss" in output[0] else {}


class ClipGradients:
    """Scale the gradients down, before every step, to a norm of at most `norm`, all parameters taken together."""

    def __init__(self, network: nn.Module, norm: float = 1.0) -> None:
        self.network, self.norm = network, norm

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._clip)

    def _clip(self, engine: Engine) -> None:
        if engine.amp and engine.scaler is not None:
            engine.scaler.unscale_(engine.optimizer)  # the scaler's step then knows that it has been done
        nn.utils.clip_grad_norm_(self.network.parameters(), self.norm)


def average_of(network: nn.Module) -> nn.Module:
    """A copy of a network, or of what DistributedDataParallel wraps, without gradients, for `AverageWeights`."""
    return copy.deepcopy(getattr(network, "module", network)).requires_grad_(False).eval()


class AverageWeights:
    """Keep the exponential mean of the weights over the iterations t = 1, 2, ... in a copy of the network.

    average <- average + m (weights - average),  m = max(momentum, 9 / (9 + t)), so that it follows fast at first

    Unlike ignite's EMAHandler it goes on where a training does: m depends on t alone.

    Args:
        network: that is trained.
        average: of `average_of`; save it with the rest of the state.
        momentum: 1 / momentum iterations are what the mean remembers.
    """

    def __init__(self, network: nn.Module, average: nn.Module, momentum: float = 0.001) -> None:
        self.network, self.average, self.momentum = getattr(network, "module", network), average, momentum

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._follow)

    @torch.no_grad()
    def _follow(self, engine: Engine) -> None:
        part = max(self.momentum, 9 / (9 + engine.state.iteration))
        for mean, now in zip(self.average.parameters(), self.network.parameters()):
            mean.lerp_(now, part)
        for mean, now in zip(self.average.buffers(), self.network.buffers()):
            mean.copy_(now)


class Progress:
    """Tell a loss, as its attribute `progress`, at every epoch which share of the training is behind: from 0 to 1."""

    def __init__(self, loss: nn.Module) -> None:
        self.loss = loss

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._tell)

    def _tell(self, engine: Engine) -> None:
        self.loss.progress = (engine.state.epoch - 1) / engine.state.max_epochs


def warm_flat_cosine(
    epochs: int, *, warm: int = 1, flat: float = 0.6, last: float = 0.02
) -> Callable[[int], float]:
    """Factor of the learning rate in each epoch (from 0): a straight rise, a flat part, half a cosine down to `last`.

    Args:
        epochs: of the training.
        warm: epochs of the rise, of (n + 1) / (warm + 1) each.
        flat: share of the epochs that ends the flat part.
    """

    def factor(epoch: int) -> float:
        if epoch < warm:
            return (epoch + 1) / (warm + 1)
        begin = flat * epochs
        done = min(max((epoch - begin) / max(epochs - begin, 1), 0), 1)
        return last + (1 - last) * (1 + math.cos(math.pi * done)) / 2

    return factor


class EpochSampler:
    """Tell a DistributedSampler the epoch, so that every epoch shuffles anew."""

    def __init__(self, sampler: DistributedSampler) -> None:
        self.sampler = sampler

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, lambda e: self.sampler.set_epoch(e.state.epoch))


def init_processes(device: str | torch.device | None = None) -> None:
    """Join the process group that torchrun describes: NCCL on GPUs, gloo on CPUs.

    Args:
        device: on which this process computes; by default `rank_device`.

    Raises:
        InputError: torchrun has not started this process.
    """
    if "RANK" not in os.environ:
        raise InputError(
            f"multi_gpu_train.json: start it with {TORCHRUN} -m monai.bundle run ...; train.json needs none"
        )
    device = torch.device(rank_device() if device is None else device)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(leave_group)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Ignite looks at the group when first asked for the rank, by a collective call: rank 0 alone would wait for ever.
    ignite.distributed.sync()
