"""Do more motion-aware layers separate sliding organs better? RAN with q = 0 and q = 4 on the same budget.

    python tests/bench/bench_sliding.py                       # 300 steps each, 32x48x32, one thread
    python tests/bench/bench_sliding.py --steps 400 --size "(32,16,16)" --shift 2.0 --supervised True \
        --learning_rate 0.002 --pairs 32 --seeds 3          # that of the model card

Every step is a new pair of `common.phantom.sliding_pair`, the same for both networks. The error is the mean length of
disp - truth in voxels inside the fixed organs, near the interface (within `near` voxels) and further away, over pairs
that were not trained on. "zero" is the error of no displacement at all. The interface lies up to `wander` voxels off
the middle: there it would be the border of every cell of the pyramid of q = 0.
"""

import json
import sys
import time
from pathlib import Path

import fire
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bundles" / "residual_aligner")]

from common import phantom  # noqa: E402
from common.losses import RegistrationLoss, edge_weighted_diffusion  # noqa: E402
from residual_aligner import RAN  # noqa: E402

TEST_SEED = 1_000_000


def batch(seeds, size, shift, wander):
    """Image (B, 2, ...), truth (B, 3, ...), organs and depth (B, 1, ...)."""
    pairs = [phantom.sliding_pair(size, seed, shift=shift, wander=wander) for seed in seeds]
    image, disp = (torch.stack([torch.from_numpy(getattr(p, name)) for p in pairs]) for name in ("image", "disp"))
    organs = torch.stack([torch.from_numpy(p.fixed_label)[None] > 0 for p in pairs])
    return image, disp, organs, torch.stack([torch.from_numpy(p.depth)[None] for p in pairs])


def errors(net, size, shift, wander, near, pairs):
    """Mean error near the interface and away from it, of the network and of no displacement."""
    rows = []
    for seed in range(TEST_SEED, TEST_SEED + pairs):
        image, truth, organs, depth = batch([seed], size, shift, wander)
        with torch.no_grad():
            off = (net(image) - truth).norm(dim=1, keepdim=True)
        zero = truth.norm(dim=1, keepdim=True)
        close = organs & (depth <= near)
        rows.append([x[m].mean() for x in (off, zero) for m in (close, organs & ~close)])
    return dict(zip(("near", "far", "zero_near", "zero_far"), torch.tensor(rows).mean(0).tolist()))


def train(variant, seed, steps, size, shift, wander, learning_rate, smoothness, supervised):
    torch.manual_seed(seed)
    net = RAN(variant=variant)
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: max(1 - n / steps, 0) ** 0.9)
    similar = RegistrationLoss("mse", smoothness=smoothness, edges=25.0)
    for step in range(steps):
        image, truth, organs, _ = batch([seed * steps + step], size, shift, wander)
        disp = net(image)
        if supervised:
            loss = ((disp - truth).square() * organs).sum() / organs.sum()
            loss = loss + smoothness * edge_weighted_diffusion(disp, image[:, 1:], sharpness=25.0)
        else:
            loss = similar(disp, image)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return net.eval()


def main(
    steps=300,
    size=(32, 48, 32),
    shift=4.0,
    wander=4.0,
    near=3.0,
    pairs=8,
    seeds=1,
    learning_rate=1e-3,
    smoothness=0.01,
    supervised=False,
    variants=("ran0", "ran4"),
    output=None,
):
    """Train each variant from `seeds` starts and print its errors; `output` also writes them as JSON."""
    settings = {key: value for key, value in locals().items() if key not in ("variants", "output")}
    torch.set_num_threads(1)
    rows = []
    for seed in range(seeds):
        for variant in variants:
            begin = time.process_time()
            net = train(variant, seed, steps, tuple(size), shift, wander, learning_rate, smoothness, supervised)
            row = {"variant": variant, "seed": seed, "cpu_s": time.process_time() - begin}
            rows.append(row | errors(net, tuple(size), shift, wander, near, pairs))
            print(
                "{variant:9s} seed {seed}: error near the interface {near:.3f}, away from it {far:.3f} voxels (no "
                "displacement: {zero_near:.3f}, {zero_far:.3f}), {cpu_s:.0f} CPU-s".format(**rows[-1]),
                flush=True,
            )
            if output:
                Path(output).write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
