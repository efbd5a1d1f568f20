"""Glue between the pair transforms and MONAI's engines: weights, inferer, metric, tables, one-sentence errors."""

import ast
import atexit
import ctypes
import hashlib
import inspect
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ignite.distributed
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.bundle import ConfigParser
from monai.bundle import run as bundle_run
from monai.data import DistributedSampler
from monai.handlers import IgniteMetricHandler
from monai.inferers import Inferer
from monai.metrics import CumulativeIterationMetric
from torch import Tensor, nn

from common import RegistrationWarning
from common.fields import compose
from common.ops import plain, warp
from common.quality.metrics import label_overlap, mean_over_labels
from common.refine import SIMILARITIES, refine
from common.run import forecast, progress
from common.run.cli import options_of, refuse_unknown
from common.run.cohort import PairTable, leave_group, run
from common.space.io import InputError

__all__ = ["PairTable", "run"]  # which the configs name as part of this module


def refuse_unknown_options() -> None:
    """Stop at an option on the command line of `monai.bundle run` that no config has; MONAI would take it silently.

    Raises:
        InputError: naming the option, and the nearest one that exists.
    """
    options = dict(options_of(sys.argv[1:]))
    files = options.get("config_file")
    if "run" not in sys.argv[1:3] or not files:
        return
    files = ast.literal_eval(files) if files.startswith("[") else files.split(",")
    known = set(ConfigParser.load_config_files(files)) | set(inspect.signature(bundle_run).parameters)
    for option in options:
        refuse_unknown(option, re.split("::|#", option)[0], known | {"bundle_root", "help"})


def keep_memory() -> None:
    """Let this process keep the memory of tensors that it frees, for the next ones, until it ends.

    glibc returns blocks above 32 MiB to the system at once, which then fills every page of the next one with zeros
    again. With another C library nothing happens. For training; a server would hold its peak for ever.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(option, value)


def load_weights(network: nn.Module, path: str | os.PathLike | None, device: torch.device | str = "cpu") -> nn.Module:
    """Load a plain state dict into `network`, strictly, and move it to `device`; `path` None or "" leaves it untrained.

    Raises:
        InputError: missing file, not a state dict, weights of another network, or a device that is not there.
    """
    if path:
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises several kinds for a file that is no checkpoint
            raise InputError(f"{path}: not a file of weights (a state dict saved by torch.save)") from error
        state = state.get("model", state) if isinstance(state, dict) else state
        own = network.state_dict()
        if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
            raise InputError(f"{path}: not a file of weights (a state dict saved by torch.save)")
        wrong = sorted(set(own) ^ set(state)) or [k for k in own if own[k].shape != state[k].shape]
        if wrong:
            raise InputError(
                f"{path}: these weights do not fit the network {type(network).__name__}, first at {wrong[0]!r}"
            )
        network.load_state_dict(state)
        network.weights = {"file": os.path.abspath(path), "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    try:
        return network.to(device)
    except (RuntimeError, AssertionError) as error:  # no CUDA in this torch, or no such device
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from error


class RegistrationInferer(Inferer):
    """Run a network on the packed image and, if asked, improve its displacement for this pair.

    Before, time and memory of the two and of the pair as a whole are forecast, shown, and kept for the report; a pair
    that will not fit is stopped, tiled or coarsened. Up to `forecast.SIDE`^3 voxels nothing is forecast unless `memory`
    is given: measuring would be the registration itself, which takes seconds and 0.1 GiB. What network and refinement
    warn of is kept for the row. The call's `started` (time.time()) and `scan_voxels` (of the fixed scan) are for the
    forecast of the whole pair; without them it is of network and refinement alone.

    Args:
        refine_steps: steps of `common.refine.refine`; 0 leaves the network's displacement.
        passes: how often the network registers: each further pass takes the moving scan as the ones before have warped
            it, and its displacement is composed with theirs. Of what they warn, the last pass's counts.
        similarity: of the refinement; "features" takes the network's own, `network.features(scan)`.
        memory: GiB that may be used; None: most of what is free.
        too_large: what to do with a pair that needs more: "stop", "tile" or "coarsen".
        options: further keyword arguments of `refine`.
    """

    def __init__(
        self,
        refine_steps: int = 0,
        *,
        passes: int = 1,
        similarity: str = "lncc",
        memory: float | None = None,
        too_large: str = "stop",
        **options: Any,
    ) -> None:
        if not isinstance(passes, int) or isinstance(passes, bool) or passes < 1:
            raise InputError(f"--passes must be a whole number >= 1, got {passes}")
        if not isinstance(refine_steps, int) or refine_steps < 0:
            raise InputError(f"--refine_steps must be a whole number >= 0, got {refine_steps}")
        if similarity not in SIMILARITIES:
            raise InputError(f"--refine_similarity must be one of {', '.join(SIMILARITIES)}, got {similarity}")
        if memory is not None and not (isinstance(memory, (int, float)) and memory > 0):
            raise InputError(f"--memory must be a number of GiB, got {memory}")
        if too_large not in forecast.POLICIES:
            raise InputError(f"--too_large must be one of {', '.join(forecast.POLICIES)}, got {too_large}")
        self.passes, self.refine_steps, self.similarity, self.options = passes, refine_steps, similarity, options
        self.memory, self.too_large = memory, too_large
        self._cost: forecast.Cost | None = None  # measured once, on the first pair that is large enough

    def __call__(
        self,
        inputs: Tensor,
        network: Callable[..., Tensor],
        *args: Any,
        mask: Tensor | None = None,
        started: float | None = None,
        scan_voxels: int = 0,
        **kwargs: Any,
    ) -> Tensor:
        image = plain(inputs)
        # The mask travels as two more channels, so that tiles and coarser grids treat it as they do the scans.
        packed = image if mask is None else torch.cat([image, mask.to(image)], 1)

        def run(steps: int, quiet: bool = False) -> forecast.Run:
            def registered(part: Tensor) -> Tensor:
                own = part[:, : image.shape[1]]
                weight = None if mask is None else part[:, image.shape[1] :]
                return self._register(own, network, weight, steps, quiet, args, kwargs)

            return registered

        with warnings.catch_warnings(record=True):
            how, size = self._forecast(packed, run, started, scan_voxels)
        progress.stage("network" if how == "whole" else f"network, {how}")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            if mask is not None and not self.refine_steps:
                text = "masks act in the refinement only, and --refine_steps is 0"
                warnings.warn(text, RegistrationWarning, stacklevel=2)
            disp = forecast.run_planned(run(self.refine_steps), packed, how, size)
        for warning in caught:
            if issubclass(warning.category, RegistrationWarning):
                progress.note(str(warning.message))
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return disp

    def _register(self, image, network, mask, steps, quiet, args, kwargs) -> Tensor:
        moving, fixed = image.chunk(2, dim=1)
        pair, disp = image, None
        for left in reversed(range(self.passes)):
            with warnings.catch_warnings():
                if left:
                    warnings.simplefilter("ignore", RegistrationWarning)
                further = network(pair, *args, **kwargs).float()
            disp = further if disp is None else compose(disp, further)
            if left:
                pair = torch.cat([warp(moving, disp), fixed], 1)
        if not steps:
            return disp
        features = getattr(network, "features", None) if self.similarity == "features" else None
        if self.similarity == "features" and features is None:
            raise InputError(f"--refine_similarity features: {type(network).__name__} has no features of its own")
        if hasattr(features, "pooled"):  # averaged over blocks, on a grid that `refine` does not take
            name = type(features).__name__
            text = f"not with {name}, whose grid it does not take; mind or lncc would do"
            raise InputError(f"--refine_similarity features: {text}")
        options = {"similarity": self.similarity, "features": features, "mask": mask} | self.options
        if quiet:
            options["progress"] = False
        else:
            progress.stage("refining")
        return refine(disp, image, steps, **options)

    def _forecast(
        self, image: Tensor, run: Callable[..., forecast.Run], started: float | None, scan_voxels: int
    ) -> tuple[str, tuple[int, int, int]]:
        size = tuple(image.shape[2:])
        voxels = image[0, 0].numel()
        small = voxels <= forecast.SIDE**3
        if small and self.memory is None:
            return "whole", size
        cost = self._cost
        if cost is None:
            progress.stage("forecasting")
            steps = {"steps": self.refine_steps, "run_steps": lambda steps: run(steps, quiet=True)}
            cost = forecast.measure_cost(run(0), image, **steps)
            self._cost = None if small else cost
        free = forecast.free_memory(image.device)
        limit = self.memory * forecast.GIB if self.memory else free and forecast.MARGIN * free
        how, size = forecast.plan(size, cost, limit, self.too_large)
        network = forecast.Cost(voxels * cost.seconds, voxels * cost.bytes)
        told = {"seconds": network.seconds, "gib": network.bytes / forecast.GIB}
        told |= {"free_gib": None if free is None else free / forecast.GIB, "plan": how, "size": list(size)}
        text = f"{told['seconds']:.0f} s and {told['gib']:.1f} GiB for the network"
        if started is not None:  # a pair read from files and delivered to files
            pair = forecast.whole_pair(network, image.device, scan_voxels, time.time() - started)
            told |= {"pair_seconds": pair.seconds, "pair_gib": pair.bytes / forecast.GIB}
            text = f"{told['pair_seconds']:.0f} s and {told['pair_gib']:.1f} GiB in all, {text}"
        progress.put(forecast=told)
        free_text = "unknown" if free is None else f"{told['free_gib']:.1f} GiB"
        progress.say(f"forecast: {text}, {free_text} free")
        if how != "whole":
            words = {"tile": "in tiles of", "coarsen": "on a coarser grid of"}[how]
            progress.note(f"registered {words} {' x '.join(map(str, size))} voxels, as memory is short")
        return how, size


def prepare_masked(batch: dict, device: torch.device, non_blocking: bool = False, **kwargs: Any) -> tuple:
    """Input of a pair and no target; for the inferer the "mask" (B, 2, I, J, K), if there is one, when the pair was
    begun, and how many voxels its fixed scan has."""
    image = batch["image"].to(device, non_blocking=non_blocking, **kwargs)
    known = {"started": float(batch["started"]), "scan_voxels": batch["fixed"][0, 0].numel()}
    if "mask" in batch:
        known["mask"] = torch.as_tensor(batch["mask"]).to(device, non_blocking=non_blocking, **kwargs)
    return image, None, (), known


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


# ---- training -------------------------------------------------------------------------------------------------------


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


def label_dice_handler(minimum: int = 0) -> IgniteMetricHandler:
    """Key metric of the validation: mean label Dice of "warped_label" against "target_label"; nan without labels."""
    return IgniteMetricHandler(metric_fn=LabelDice(minimum), output_transform=_warped_and_target)


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
    """Progress bar over the iterations of an epoch, in training with the loss."""

    def __init__(self, name: str = "train") -> None:
        self.name = name

    def attach(self, engine: Engine) -> None:
        bar = ProgressBar(desc=self.name, persist=False)
        bar.attach(engine, output_transform=self._shown)

    @staticmethod
    def _shown(output: list[dict]) -> dict[str, float]:
        return {"loss": round(float(output[0]["loss"]), 4)} if "loss" in output[0] else {}


class EpochSampler:
    """Tell a DistributedSampler the epoch, so that every epoch shuffles anew."""

    def __init__(self, sampler: DistributedSampler) -> None:
        self.sampler = sampler

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, lambda e: self.sampler.set_epoch(e.state.epoch))


def init_processes() -> None:
    """Join the process group that torchrun describes: NCCL on GPUs, gloo on CPUs."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(leave_group)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank_device())
    # Ignite looks at the group when first asked for the rank, by a collective call: rank 0 alone would wait for ever.
    ignite.distributed.sync()


def rank_device() -> torch.device:
    """The GPU of this process on its machine, or the CPU; without torchrun the first GPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
