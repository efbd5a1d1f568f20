"""CPU seconds and peak memory of RAN's forward pass and training step, a variant a process.

    python tests/bench/bench_residual_aligner.py                          # all variants, 80x96x80, one thread
    python tests/bench/bench_residual_aligner.py --size 96,80,128 --variants ran3 --training False

The training step is that of train.json: forward, squared LNCC with edge-weighted diffusion of both directions and their
inverse error, backward and Adam, with `recompute` where the variant has all modules at full resolution. Input: random.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import fire
from machine import ROOT, one_thread, peak_gib

sys.path[:0] = [str(ROOT), str(ROOT / "bundles" / "residual_aligner")]


def child(variant, size, training):
    import torch

    from common.losses import RegistrationLoss
    from residual_aligner import RAN, BothDirections

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, image = RAN(variant=variant, recompute=variant.startswith("ran4")), torch.rand(1, 2, *size)
    begin = time.process_time()
    if training:
        optimizer = torch.optim.Adam(net.parameters())
        loss = BothDirections(RegistrationLoss(edges=1.0), consistency=0.05)
        loss(net.forward_train(image), image).backward()
        optimizer.step()
    else:
        with torch.no_grad():
            net(image)
    print(json.dumps({"cpu_s": time.process_time() - begin, "peak_gib": peak_gib()}))


def main(size=(80, 96, 80), variants=("ran0", "ran3", "ran4", "ran4plus"), training=True, output=None):
    """Print a line a variant and kind; `output` also writes them as JSON."""
    rows = []
    for variant in [variants] if isinstance(variants, str) else variants:
        for kind in ("forward", "training step")[: 1 + training]:
            call = [sys.executable, __file__, "child", variant, json.dumps(size), str(int(kind != "forward"))]
            done = subprocess.run(call, env=one_thread(), capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            row = {"variant": variant, "kind": kind, "size": list(size)} | json.loads(done.stdout)
            rows.append(row)
            print("{variant:9s} {kind:14s} {cpu_s:7.1f} CPU-s {peak_gib:6.2f} GiB peak".format(**row), flush=True)
    if output:
        Path(output).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "child":
        child(sys.argv[2], json.loads(sys.argv[3]), bool(int(sys.argv[4])))
    else:
        fire.Fire(main)
