"""Self-supervised training of SAM: two views of each scan, and a contrast between same and other places."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.fields import identity
from common.ops import plain, warp
from samconvex.network import halve, warp_onto_background
from samconvex.sam import GLOBAL, LOCAL, Embedding


class Matches(NamedTuple):
    """The same N places in both views of B scans: voxels (B, N, 3) of the first and of the second view."""

    first: Tensor
    second: Tensor


class TwoViews:
    """Prepare a batch: two random views of every scan and the places that both show.

    A view is a box of the scan at one level of its pyramid, turned, scaled and shifted, in other grey values. All views
    of a batch are of one level, chosen at random, since a network that serves all levels has to know all.

    Args:
        sizes: voxels of a view along each axis at level 0 (full resolution), 1 (halved), ...
        points: N, places a scan.
        rotation: of each view about each axis, up to so many degrees.
        scale: of each view, between exp(-scale) and exp(scale).
        shift: of the second view against the first, up to this share of its size.
        gamma, noise, blur: change of the grey values: exponent between exp(-gamma) and exp(gamma), standard deviation
            of the noise, share of the views that are blurred by a 3x3x3 mean.

    Returns (when called with a batch, as `prepare_batch` of a trainer):
        views (2B, C, I, J, K), the first views of all scans before the second ones, and `Matches`.

    Source: SAM (Yan et al., TMI 2022), "two augmented patches of one scan"; the levels are SAMConvex section 2.4.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (48, 40, 24),
        *,
        points: int = 128,
        rotation: float = 30.0,
        scale: float = 0.15,
        shift: float = 0.25,
        gamma: float = 0.3,
        noise: float = 0.03,
        blur: float = 0.3,
    ) -> None:
        if not sizes or min(sizes) < 8:
            raise ValueError(f"TwoViews() 'sizes' must be one number >= 8 a level, got {tuple(sizes)}")
        self.sizes, self.points, self.rotation, self.scale = tuple(sizes), points, rotation, scale
        self.shift, self.gamma, self.noise, self.blur = shift, gamma, noise, blur

    def __call__(
        self, batch: dict, device: torch.device, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Matches]:
        scans = plain(batch["image"]).to(device, non_blocking=non_blocking, **kwargs)
        level = int(torch.randint(len(self.sizes), ()))
        for _ in range(level):
            scans = halve(scans)
        size = self.sizes[level]
        centre = _foreground_voxel(scans)
        poses = [self._pose(len(scans)) for _ in range(2)]
        apart = (torch.rand(len(scans), 3) * 2 - 1) * self.shift * size
        centres = [centre, centre + apart]
        views = [self._view(scans, pose, c, size) for pose, c in zip(poses, centres)]
        return torch.cat(views), self._matches(views, poses, centres, size)

    def _pose(self, batch: int) -> Tensor:
        """(B, 3, 3) rotation times scale: from voxels of the view to voxels of the scan."""
        angles = (torch.rand(batch, 3) * 2 - 1) * torch.pi * self.rotation / 180
        pose = torch.eye(3).expand(batch, 3, 3)
        for axis, (a, b) in enumerate(((1, 2), (0, 2), (0, 1))):
            cos, sin = angles[:, axis].cos(), angles[:, axis].sin()
            turn = torch.eye(3).repeat(batch, 1, 1)
            turn[:, a, a], turn[:, b, b], turn[:, a, b], turn[:, b, a] = cos, cos, -sin, sin
            pose = turn @ pose
        return pose * ((torch.rand(batch, 1, 1) * 2 - 1) * self.scale).exp()

    def _view(self, scans: Tensor, pose: Tensor, centre: Tensor, size: int) -> Tensor:
        """The scans at pose (y - middle) + centre for voxels y of a (size, size, size) grid, grey values changed."""
        grid = identity((size,) * 3, like=scans)  # (1, 3, I, J, K)
        pose, centre = pose.to(scans), centre.to(scans)
        middle = (size - 1) / 2
        places = torch.einsum("bij,bjxyz->bixyz", pose, (grid - middle).expand(len(scans), -1, -1, -1, -1))
        view = warp_onto_background(scans, places + centre.view(-1, 3, 1, 1, 1) - grid)
        blurred = torch.rand(len(view)) < self.blur
        if blurred.any():
            view[blurred] = F.avg_pool3d(view[blurred], 3, stride=1, padding=1, count_include_pad=False)
        exponent = ((torch.rand(len(view), 1, 1, 1, 1) * 2 - 1) * self.gamma).exp().to(view)
        inside = view > view.amin((2, 3, 4), keepdim=True)
        return (view.clamp(min=0) ** exponent + self.noise * torch.randn_like(view) * inside).clamp(min=0)

    def _matches(self, views: list[Tensor], poses: list[Tensor], centres: list[Tensor], size: int) -> Matches:
        """Foreground voxels of the first view that the second one shows too, drawn with replacement."""
        middle, firsts, seconds = (size - 1) / 2, [], []
        inverse = torch.linalg.inv(poses[1])
        for b, view in enumerate(views[0]):
            inside = (view[0] > view[0].min()).nonzero().cpu().float()
            if not len(inside):  # an empty view: its middle, which the second one shows as well
                inside = torch.full((1, 3), middle)
            first = inside[torch.randint(len(inside), (8 * self.points,))]
            scan = (first - middle) @ poses[0][b].T + centres[0][b]
            second = (scan - centres[1][b]) @ inverse[b].T + middle
            seen = ((second >= 0) & (second <= size - 1)).all(1).nonzero()[:, 0]
            seen = seen if len(seen) else torch.arange(len(first))
            chosen = seen[torch.randint(len(seen), (self.points,))]
            firsts.append(first[chosen])
            seconds.append(second[chosen].clamp(0, size - 1))
        return Matches(torch.stack(firsts).to(views[0]), torch.stack(seconds).to(views[0]))


def _foreground_voxel(scans: Tensor) -> Tensor:
    """(B, 3) a random voxel of each scan above its smallest value."""
    found = []
    for scan in scans:
        inside = (scan[0] > scan[0].min()).nonzero().cpu()
        found.append(inside[torch.randint(len(inside), ())] if len(inside) else torch.tensor(scan.shape[1:]) // 2)
    return torch.stack(found).float()


class ContrastiveLoss(nn.Module):
    """Pull the two embeddings of one place together, push those of other places away.

    loss = mean over places and heads of -log(e^(q.p / t) / (e^(q.p / t) + sum_n e^(q.n / t)))

    q is the vector of a place in one view, p of the same place in the other, n the negatives: the `hard` most similar
    vectors of either view farther than `distance` from the place, and `diverse` ones drawn from all views of the batch.
    The local head takes as hard what local and global vector together find similar: it learns what the global one
    cannot tell apart. Both views take their turn as q.

    Args:
        temperature: t.
        hard: number of hard negatives from each of the two views.
        diverse: number of random negatives.
        distance: (local, global) distance in voxels of the view, within which a vector counts as the same place.

    Source: SAM (Yan et al., TMI 2022), hard and diverse negatives on both heads; t of SAMConvex's own training is 0.5.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        hard: int = 64,
        diverse: int = 128,
        distance: tuple[float, float] = (4.0, 12.0),
    ) -> None:
        super().__init__()
        self.temperature, self.hard, self.diverse, self.distance = temperature, hard, diverse, distance

    def forward(self, embedding: Embedding, matches: Matches) -> Tensor:
        """Embedding of the 2B views, in the order of `TwoViews`."""
        fine, coarse = embedding
        with torch.no_grad():
            whole = F.interpolate(coarse, size=fine.shape[2:], mode="trilinear", align_corners=True)
            both = torch.cat([fine, F.normalize(whole, dim=1)], 1)
        local = self._head(fine, both, LOCAL, self.distance[0], matches)
        return (local + self._head(coarse, coarse.detach(), GLOBAL, self.distance[1], matches)) / 2

    def _head(self, maps: Tensor, judge: Tensor, stride: Sequence[int], distance: float, matches: Matches) -> Tensor:
        """The loss of one embedding (2B, E, i, j, k); `judge` (2B, F, i, j, k) says what is hard."""
        sides = list(zip(maps.chunk(2), judge.chunk(2), matches))
        vectors = [sample(part, at, stride) for part, _, at in sides]
        everything = maps.permute(0, 2, 3, 4, 1).flatten(0, 3)
        loss = maps.new_zeros(())
        for query, other, (_, own, at) in zip(vectors, reversed(vectors), sides):
            asks = sample(own, at, stride)
            logits = [(query * other).sum(-1, keepdim=True)]
            for part, judged, place in sides:
                negatives, same = self._hard(part, asks, judged, place, stride, distance)
                likeness = torch.einsum("bne,bnhe->bnh", query, negatives)
                logits.append(likeness.masked_fill(same, -torch.inf))
            drawn = everything[torch.randint(len(everything), (self.diverse,)).to(everything.device)]
            logits.append(query @ drawn.T)
            scores = torch.cat(logits, -1).flatten(0, 1) / self.temperature
            loss = loss + F.cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.int64)) / 2
        return loss

    def _hard(
        self, maps: Tensor, asks: Tensor, judged: Tensor, place: Tensor, stride: Sequence[int], distance: float
    ) -> tuple[Tensor, Tensor]:
        """(B, N, hard, E) vectors of `maps` whose `judged` ones are most similar to `asks`, away from `place`.

        Also (B, N, hard): which of them are of the place itself all the same, where a small view has too few others.
        """
        voxels = identity(maps.shape[2:], like=maps)[0].flatten(1).T * torch.tensor(stride, device=maps.device)
        with torch.no_grad():
            similarity = asks @ judged.flatten(2)
            near = torch.cdist(place, voxels.expand(len(place), -1, -1)) < distance
            similarity.masked_fill_(near, -torch.inf)
            best, index = similarity.topk(min(self.hard, similarity.shape[-1]), dim=-1)
        rows = maps.flatten(2).transpose(1, 2)
        return torch.stack([row[at] for row, at in zip(rows, index)]), best == -torch.inf


def sample(maps: Tensor, voxels: Tensor, stride: Sequence[int]) -> Tensor:
    """Unit vectors (B, N, E) of `maps` (B, E, i, j, k) at `voxels` (B, N, 3) of the scan, trilinear."""
    there = (voxels / torch.tensor(stride, device=voxels.device)).transpose(1, 2)[..., None, None]
    found = warp(maps, there - identity(there.shape[2:], like=there))
    return F.normalize(found[..., 0, 0], dim=1).transpose(1, 2)
