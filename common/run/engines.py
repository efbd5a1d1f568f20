"""Glue between the pair transforms and MONAI's engines: weights, inferer, metric, tables, one-sentence errors."""

import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor, nn

from common import InputError, RegistrationWarning
from common.fields import compose, integrate
from common.graphs import Graphed, modules_state
from common.halves import flow_between
from common.holes import fill, spread
from common.ops import plain, warp
from common.refine import SIMILARITIES, Guide, refine
from common.run import forecast, progress
from common.run.choose import ALIKE, tissue_correlation
from common.run.cohort import PairTable, run

__all__ = ["PairTable", "run"]  # which the configs name as part of this module
GENTLE = 0.1  # learning rate of the steps from a start, which is near already: 0.5 first leads away from it
UNGUIDED = "--guide: points guide the refinement, which needs --refine_steps, as 50"


def load_weights(network: nn.Module, path: str | os.PathLike | None, device: torch.device | str = "cpu") -> nn.Module:
    """Load a plain state dict into `network`, strictly, and move it to `device`; `path` None or "" leaves it untrained.

    `network.weights`, for the report, says which file it was, its SHA-256, and whether that is the one of metadata.json
    ("weights_sha256"): None for a file that the bundle does not ship. One that should be and is not is said.

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
        wrong = sorted(set(own) ^ set(state), key=str) or [k for k in own if own[k].shape != state[k].shape]
        if wrong:
            raise InputError(
                f"{path}: these weights do not fit the network {type(network).__name__}, first at {wrong[0]!r}"
            )
        for name, value in state.items():
            _refuse_numbers(f"{path}: {name!r}", value, own[name])
        network.load_state_dict(state)
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        network.weights = {"file": os.path.abspath(path), "sha256": digest, "as_published": _as_published(path, digest)}
    try:
        return network.to(device)
    except (RuntimeError, AssertionError) as error:  # no CUDA in this torch, or no such device
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from error


def _as_published(path: str | os.PathLike, digest: str) -> bool | None:
    file = Path(path).absolute()
    try:
        meta = json.loads((file.parents[1] / "configs" / "metadata.json").read_text(encoding="utf-8"))
        published = meta["weights_sha256"][f"{file.parent.name}/{file.name}"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # no bundle, or no file that it ships
        return None
    if digest != published:
        text = f"{path}: not the file that the bundle's metadata.json names; the report says so"
        print(f"warning: {text}", file=sys.stderr, flush=True)
    return digest == published


def _refuse_numbers(where: str, value: Tensor, own: Tensor) -> None:
    """Stop at numbers that PyTorch would take, or cut, without a word."""
    if value.layout != torch.strided:
        raise InputError(f"{where} is sparse, not a plain tensor")
    if value.is_floating_point() != own.is_floating_point() or value.is_complex():
        kinds = f"{value.dtype} numbers, the network's are {own.dtype}"
        raise InputError(f"{where} holds {kinds}".replace("torch.", ""))
    if value.is_floating_point() and not value.isfinite().all():
        raise InputError(f"{where} holds NaN or infinite values")


def _fitting(image: Tensor) -> str:
    """What a refinement should compare: LNCC of aligned scans, or MIND if a contrast that both have is not alike."""
    pairs = zip(*image[0].cpu().numpy().reshape(2, -1, *image.shape[2:]))
    alike = [tissue_correlation(moved, there, (moved > 0) & (there > 0)) for moved, there in pairs]
    return "lncc" if min(alike) >= ALIKE else "mind"


class RegistrationInferer(Inferer):
    """Run a network on the packed image and, if asked, improve its displacement for this pair.

    Before, time and memory of the two and of the pair as a whole are forecast, shown, and kept for the report; a pair
    that will not fit is stopped, tiled or coarsened. Up to `forecast.SIDE`^3 voxels nothing is forecast unless `memory`
    is given: measuring would be the registration itself, which takes seconds and 0.1 GiB. What network and refinement
    warn of is kept for the row. From a `start`, a displacement (B, 3, I, J, K), the steps alone go on; without steps,
    the network registers what is left. What a mask leaves out is filled before the network sees it
    (`common.holes.fill`), and there the displacement of the network is continued from around it. The call's `started`
    (time.time()) and `scan_voxels` (of the fixed scan) are for the forecast of the whole pair; without them it is of
    network and refinement alone.

    Args:
        refine_steps: steps of `common.refine.refine`; 0 leaves the network's displacement.
        passes: how often the network registers: each further pass takes the moving scan as the ones before have warped
            it, and its displacement is composed with theirs. Of what they warn, the last pass's counts.
        similarity: of the refinement; "features" takes the network's own, `network.features(scan)`; "auto" LNCC for two
            scans of one contrast and MIND for two, by `choose.tissue_correlation` of the aligned scans, once a pair.
        memory: GiB that may be used; None: most of what is free.
        too_large: what to do with a pair that needs more: "stop", "tile" or "coarsen".
        cost: {"units": ..., "bytes": ...} that the network takes a voxel, as `forecast.Work` says; without, and with a
            refinement of which nothing is known, it is measured on a crop of the first pair that is large enough.
        guide: weight with which the points of a call guide the refinement, in mm; a call's own `guide` wins.
        midspace: register in both directions, and take what lies in their middle: swapping the scans gives the inverse.
        diffeomorphic: the result is the flow of a stationary velocity, which cannot fold; the steps look for that.
        cuda_graphs: on a GPU, replay what is repeated at one size as a CUDA graph: the steps of the refinement, and the
            network from its second pair of a size on, if it says that it is `capturable`. The report says what was.
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
        cost: dict[str, float] | None = None,
        guide: float = 0.0,
        midspace: bool = False,
        diffeomorphic: bool = False,
        cuda_graphs: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(passes, int) or isinstance(passes, bool) or passes < 1:
            raise InputError(f"--passes must be a whole number >= 1, got {passes}")
        if not isinstance(refine_steps, int) or refine_steps < 0:
            raise InputError(f"--refine_steps must be a whole number >= 0, got {refine_steps}")
        if similarity not in (words := (*SIMILARITIES, "auto")):
            raise InputError(f"--refine_similarity must be one of {', '.join(words)}, got {similarity}")
        if memory is not None and not (isinstance(memory, (int, float)) and memory > 0):
            raise InputError(f"--memory must be a number of GiB, got {memory}")
        if too_large not in forecast.POLICIES:
            raise InputError(f"--too_large must be one of {', '.join(forecast.POLICIES)}, got {too_large}")
        self.passes, self.refine_steps, self.similarity, self.options = passes, refine_steps, similarity, options
        if guide and not refine_steps:
            raise InputError(UNGUIDED)
        self.memory, self.too_large, self.guide, self.midspace = memory, too_large, guide, midspace
        self._work = None if cost is None else forecast.Work(**cost)
        self._cost: forecast.Cost | None = None  # once measured
        self.diffeomorphic, self.cuda_graphs = diffeomorphic, cuda_graphs
        self._graphed: Graphed | None = None  # the network that was run last

    def __call__(
        self,
        inputs: Tensor,
        network: Callable[..., Tensor],
        *args: Any,
        mask: Tensor | None = None,
        points: tuple[Tensor, Tensor, Tensor] | None = None,
        guide: float | None = None,
        start: Tensor | None = None,
        started: float | None = None,
        scan_voxels: int = 0,
        **kwargs: Any,
    ) -> Tensor:
        image = plain(inputs)
        guide = self.guide if guide is None else guide
        if guide and not self.refine_steps:
            raise InputError(UNGUIDED)
        # Once for all tiles and both directions, which have to compare the same.
        similarity = _fitting(image) if self.similarity == "auto" and self.refine_steps else self.similarity
        # Mask and start travel as more channels, so that tiles and coarser grids treat them as they do the scans.
        beside = [x.to(image) for x in (mask, start) if x is not None]
        packed = torch.cat([image, *beside], 1)

        def run(steps: int, quiet: bool = False) -> forecast.Run:
            def registered(part: Tensor) -> Tensor:
                own, *rest = part.split([image.shape[1], *(x.shape[1] for x in beside)], 1)
                weight = rest.pop(0) if mask is not None else None
                begun = rest[0] * _share(image, part, how).view(1, 3, 1, 1, 1) if start is not None else None
                marks = self._guide(points, guide, image, part, how)
                options = {"steps": steps, "similarity": similarity, "quiet": quiet, "args": args, "kwargs": kwargs}
                if not self.midspace:
                    return self._register(own, network, weight, marks, begun, **options)
                return self._both_ways(own, network, weight, marks, **options)

            return registered

        how = "forecast"
        with warnings.catch_warnings(record=True):
            how, size = self._forecast(packed, run, started, scan_voxels)
        progress.stage("network" if how == "whole" else f"network, {how}")
        if how == "tile" and self.diffeomorphic:
            progress.note("registered in tiles: only within one the displacement is a flow")
        if how == "tile" and points is not None:
            progress.note("registered in tiles, where points do not guide")
        with progress.noting():
            disp = forecast.run_planned(run(self.refine_steps), packed, how, size)
        return disp

    def _guide(self, points: tuple | None, weight: float, image: Tensor, part: Tensor, how: str) -> Guide | None:
        """`points` on the grid of `part`, a coarser one of the same field of view; none in a tile or a crop."""
        if points is None or not weight or (how != "coarsen" and image.shape[2:] != part.shape[2:]):
            return None
        scale = _share(image, part, how)
        return Guide(points[0] * scale, points[1] * scale, points[2] / scale, weight)

    def _both_ways(self, image, network, mask, guide, **options) -> Tensor:
        """Displacement whose inverse is that of the swapped scans, from both directions."""
        forward = self._register(image, network, mask, guide, None, **options)
        swapped = [None if x is None else torch.cat(x.chunk(2, 1)[::-1], 1) for x in (image, mask)]
        marks = guide and guide._replace(fixed=guide.moving, moving=guide.fixed)
        backward = self._register(swapped[0], network, swapped[1], marks, None, **options)
        return integrate(flow_between(forward, backward))

    def _register(self, image, network, mask, guide, start, *, steps, similarity, quiet, args, kwargs) -> Tensor:
        image = image if mask is None else fill(image, mask)
        moving, fixed = image.chunk(2, dim=1)
        pair, disp = image if start is None else torch.cat([warp(moving, start), fixed], 1), start
        for left in reversed(range(self.passes if start is None or not steps else 0)):
            with warnings.catch_warnings():
                if left:
                    warnings.simplefilter("ignore", RegistrationWarning)
                further = self._pass(network, pair, quiet, args, kwargs).float()
            disp = further if disp is None else compose(disp, further)
            if left:
                pair = torch.cat([warp(moving, disp), fixed], 1)
        if mask is not None:
            known = warp(mask[:, :1], disp) * mask[:, 1:]
            disp = spread(disp, known > 0.5) if (known > 0.5).any() else disp
        if not steps:
            return refine(disp, image, 0, diffeomorphic=True) if self.diffeomorphic else disp
        features = getattr(network, "features", None) if similarity == "features" else None
        if similarity == "features" and features is None:
            raise InputError(f"--refine_similarity features: {type(network).__name__} has no features of its own")
        if hasattr(features, "pooled"):  # averaged over blocks, on a grid that `refine` does not take
            name = type(features).__name__
            text = f"not with {name}, whose grid it does not take; mind or lncc would do"
            raise InputError(f"--refine_similarity features: {text}")
        options = {"similarity": similarity, "features": features, "mask": mask, "guide": guide} | self.options
        options |= {} if start is None else {"learning_rate": GENTLE}
        options |= {"progress": False if quiet else progress.step, "graphs": self.cuda_graphs}
        options["diffeomorphic"] = self.diffeomorphic
        if not quiet:
            progress.stage("refining" if similarity == self.similarity else f"refining by {similarity.upper()}")
        return refine(disp, image, steps, **options)

    def _pass(self, network: Callable[..., Tensor], pair: Tensor, quiet: bool, args: tuple, kwargs: dict) -> Tensor:
        if quiet or args or kwargs or not (self.cuda_graphs and getattr(network, "capturable", False)):
            return network(pair, *args, **kwargs)
        if self._graphed is None or self._graphed.function is not network:
            self._graphed = Graphed(network, pair.device, state=lambda: modules_state(network))
        disp = self._graphed(pair)
        if self._graphed.told != "off":
            progress.put(cuda_graph=self._graphed.told)
        return disp

    def _forecast(
        self, image: Tensor, run: Callable[..., forecast.Run], started: float | None, scan_voxels: int
    ) -> tuple[str, tuple[int, int, int]]:
        size = tuple(image.shape[2:])
        voxels = image[0, 0].numel()
        small = voxels <= forecast.SIDE**3
        if small and self.memory is None:
            return "whole", size
        cost = self._cost
        known = self.similarity in forecast.STEP and not self.diffeomorphic
        if cost is None and self._work and (known or not self.refine_steps):
            ways = 1 + self.midspace
            options = {"passes": ways * self.passes, "steps": ways * self.refine_steps, "similarity": self.similarity}
            cost = forecast.known_cost(self._work, image.device, **options)
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
            progress.expect(pair.seconds)
            text = f"{told['pair_seconds']:.0f} s and {told['pair_gib']:.1f} GiB in all, {text}"
        progress.put(forecast=told)
        free_text = "unknown" if free is None else f"{told['free_gib']:.1f} GiB"
        progress.say(f"forecast: {text}, {free_text} free")
        if how != "whole":
            words = {"tile": "in tiles of", "coarsen": "on a coarser grid of"}[how]
            progress.note(f"registered {words} {' x '.join(map(str, size))} voxels, as memory is short")
        return how, size


def _share(image: Tensor, part: Tensor, how: str) -> Tensor:
    """(3,) voxels of `part` to one of `image`: below 1 on a coarser grid, 1 in a tile or a crop."""
    sizes = zip(image.shape[2:], part.shape[2:])
    return image.new_tensor([(m - 1) / max(n - 1, 1) if how == "coarsen" else 1.0 for n, m in sizes])


def prepare_masked(batch: dict, device: torch.device, non_blocking: bool = False, **kwargs: Any) -> tuple:
    """Input of a pair and no target; for the inferer the "mask" (B, 2, I, J, K), if there is one, when the pair was
    begun, and how many voxels its fixed scan has."""
    image = batch["image"].to(device, non_blocking=non_blocking, **kwargs)
    known = {"started": float(batch["started"]), "scan_voxels": batch["fixed"][0, 0].numel()}
    if "mask" in batch:
        known["mask"] = torch.as_tensor(batch["mask"]).to(device, non_blocking=non_blocking, **kwargs)
    if "guides" in batch:  # of one pair: fixed, then moving points in voxels
        fixed, moving = torch.as_tensor(batch["guides"])[0].float().to(device)
        to_mm = torch.as_tensor(batch["image"].affine).reshape(-1, 4, 4)[0, :3, :3]
        known["points"] = fixed, moving, to_mm.float().to(device)
    if "guide" in batch:
        known["guide"] = float(batch["guide"])
    if "start" in batch:
        known["start"] = torch.as_tensor(batch["start"]).to(device, non_blocking=non_blocking, **kwargs)
    return image, None, (), known


def rank_device() -> torch.device:
    """The GPU of this process on its machine, or the CPU; without torchrun the first GPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
