"""Why torch.jit.trace warns of sacb_net: how far the traced network is from the eager one, and both from float64.

    python tests/bench/bench_traced.py [--size 96,112,96]

Of random images, as `ckpt_export` draws them: share of values that differ by more than 1e-5 voxel (what the tracer
warns of), and the largest difference. "The same layers" are those that an export holds, the references, run eagerly.
"""

import sys
import warnings

import fire
import torch
from machine import ROOT

sys.path[:0] = [str(ROOT), str(ROOT / "bundles" / "sacb_net")]

from common.publish.export import network_of  # noqa: E402
from common.run.engines import load_weights  # noqa: E402


def main(size: tuple[int, int, int] = (96, 112, 96)) -> None:
    warnings.simplefilter("ignore")
    bundle, traced = ROOT / "bundles" / "sacb_net", None
    net = load_weights(network_of(bundle), bundle / "models" / "model.pt").eval()
    for seed in (0, 1):
        image = torch.rand(1, 2, *size, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            traced = traced or torch.jit.trace(net, image, check_trace=False)
            found = {"traced": traced(image), "eager": net(image)}
            asked, torch.compiler.is_exporting = torch.compiler.is_exporting, lambda: True
            found["eager, the same layers"], torch.compiler.is_exporting = net(image), asked
            found["float64"] = net.double()(image.double()).float()
            net.float()
        for one, other in (("traced", "eager"), ("traced", "eager, the same layers"), ("eager", "float64")):
            apart = (found[one] - found[other]).abs()
            share = 100 * float((apart > 1e-5).float().mean())
            print(f"image {seed}, {one} and {other}: {share:.1f} % by more than 1e-5, at most {float(apart.max()):.4f}")


if __name__ == "__main__":
    fire.Fire(main)
