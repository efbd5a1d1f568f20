"""CPU seconds and peak memory of SACB-Net's forward pass: ours against the plain unfold formulation.

    python tests/bench/bench_sacb_net.py                      # 160x192x160, N = 7, one thread, no_grad
    python tests/bench/bench_sacb_net.py --size 80,96,80 --repeats 3

Each variant runs in a process of its own, so that its peak memory is its own. "plain" is the operators' reference layer
(unfolded neighbourhoods, N masked convolutions, k-means of all points to the fixed point from evenly spaced starts) in
torch's default memory layout; "ours" is the default. The clustering itself is compared too: within-cluster scatter of
our k-means over that of the converged one from the same and from evenly spaced starts. Input: the phantom.
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import fire
from machine import ROOT, one_thread, peak_gib

sys.path[:0] = [str(ROOT), str(ROOT / "bundles" / "sacb_net")]
BUDGET = {"cpu_s": 0.3, "peak_gib": 0.6}  # what the project asks of ours / plain at full size


def phantom_image(size):
    import numpy as np
    import torch

    from common import phantom

    affine = np.eye(4)
    affine[:3, :3] *= 160.0 / size[0]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(size) - 1) / 2)
    scans = [phantom.sample(size, affine, deformation)[0] / 1000 for deformation in (phantom.Deformation(0), None)]
    return torch.from_numpy(np.stack(scans))[None]


def network(variant, backend=None):
    import torch

    from sacb_net import SACBNet

    torch.manual_seed(0)
    plain = {"kmeans_iterations": None, "kmeans_init": "even", "backend": "reference"}
    net = SACBNet(**(plain if variant == "plain" else {"backend": backend})).eval()
    weights = ROOT / "bundles" / "sacb_net" / "models" / "model.pt"
    net.load_state_dict(torch.load(weights, weights_only=True))
    return net.to(memory_format=torch.contiguous_format) if variant == "plain" else net


def child(variant, path, repeats):
    import torch

    torch.set_num_threads(1)
    image, net = torch.load(path, weights_only=True), network(variant)
    base = peak_gib()
    seconds = []
    with torch.no_grad():
        for _ in range(repeats):
            begin = time.process_time()
            disp = net(image)
            seconds.append(time.process_time() - begin)
    peak = peak_gib()
    print(
        json.dumps(
            {
                "variant": variant,
                "cpu_s": min(seconds),
                "peak_gib": peak,
                "base_gib": base,
                "mean_disp": float(disp.abs().mean()),
            }
        )
    )


def clustering(path):
    """Within-cluster scatter of the default k-means over the converged ones, a scale and scan at a time."""
    import torch

    from common.ops import kmeans

    torch.set_num_threads(1)
    image, net, rows = torch.load(path, weights_only=True), network("ours"), []

    def scatter(points, result):
        labels, centroids = result
        return float((points - centroids[0][labels[0]]).square().sum())

    def watch(scale):
        def cluster(features):
            original = type(block).cluster(block, features)
            from common.ops.sacb import box_mean

            for scan, feature in enumerate(features):
                points = box_mean(feature[None]).permute(0, 2, 3, 4, 1).reshape(1, -1, feature.shape[0])
                ours = scatter(points, kmeans(points, 7))
                row = {"scale": scale, "scan": scan}
                for init in ("spread", "even"):
                    row[f"over_converged_{init}"] = ours / scatter(points, kmeans(points, 7, None, init))
                rows.append(row)
            return original

        block = net.sacb[str(scale)]
        block.cluster = cluster

    for scale in (5, 4, 3, 2):
        watch(scale)
    with torch.no_grad():
        net(image)
    print(json.dumps(rows))


def run_child(*arguments):
    call = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(call, env=one_thread(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(size=(160, 192, 160), repeats=1, output=None, cluster_quality=True):
    """Run both variants and print the table; `output` also writes it as JSON."""
    import tempfile

    import torch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pair.pt"
        torch.save(phantom_image(tuple(size)), path)
        rows = [run_child("child", variant, path, repeats) for variant in ("plain", "ours")]
        quality = run_child("clustering", path) if cluster_quality else []
    plain, ours = rows
    for row in rows:
        cost = f"{row['cpu_s']:8.1f} CPU-s  {row['peak_gib']:6.2f} GiB peak"
        print(f"{row['variant']:6s} {cost}  (process before: {row['base_gib']:.2f})")
    ratios = {name: ours[name] / plain[name] for name in BUDGET}
    for name, limit in BUDGET.items():
        print(f"ours / plain {name}: {ratios[name]:.3f} (asked: at most {limit})")
    for row in quality:
        print(
            "k-means scatter, scale {scale} scan {scan}: {over_converged_spread:.4f} of converged from our start, "
            "{over_converged_even:.4f} of converged from even starts".format(**row)
        )
    if output:
        hardware = {
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        }
        Path(output).write_text(
            json.dumps(
                {"size": list(size), "rows": rows, "ratios": ratios, "kmeans": quality, "hardware": hardware}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "child":
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    elif len(sys.argv) > 1 and sys.argv[1] == "clustering":
        clustering(sys.argv[2])
    else:
        fire.Fire(main)
