"""Every bundle from its zip alone, in an environment that has nothing but the packages its metadata.json names.

    python tests/zips_alone.py pins                 # what to install there, as pip takes it
    python tests/zips_alone.py run THERE/bin/python # pack, serve, download there, register the phantom, load in Python

`.ci/run` makes that environment. It needs a network, which the tests of test_pack.py do without.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fire

ROOT = Path(__file__).resolve().parents[1]
BUNDLES = sorted(path for path in (ROOT / "bundles").iterdir() if path.is_dir())
LOAD = """
import torch, monai.bundle
net = monai.bundle.load({name!r}, bundle_dir="D", workflow_type="inference", args_file={{"bundle_root": "D/{name}"}})
with torch.no_grad():
    print("loaded", type(net).__module__, tuple(net(torch.rand(1, 2, 32, 32, 32)).shape))
"""


def pins() -> str:
    """name==version of all bundles, which name the same."""
    found = set()
    for bundle in BUNDLES:
        meta = json.loads((bundle / "configs" / "metadata.json").read_text())
        own = {"torch": meta["pytorch_version"], "monai": meta["monai_version"], "numpy": meta["numpy_version"]}
        versions = own | meta["required_packages_version"]
        found.add(" ".join(f"{name}=={version}" for name, version in versions.items()))
    (line,) = found
    return line


def run(python: str) -> None:
    """Stops with what a command said if one fails."""
    sys.path.insert(0, str(ROOT))
    from common.publish import pack

    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with tempfile.TemporaryDirectory() as folder:
        dist, empty = Path(folder, "dist"), Path(folder, "empty")
        empty.mkdir()
        for bundle in BUNDLES:
            pack.pack(bundle.name, output=dist)
        quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda self, *args: None})
        with ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=dist)) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            for name in (bundle.name for bundle in BUNDLES):
                (archive,) = dist.glob(f"{name}_v*.zip")
                address = f"http://127.0.0.1:{server.server_port}/{archive.name}"
                monai = "-m", "monai.bundle"
                configs = "--config_file", f"D/{name}/configs/inference.json", "--bundle_root", f"D/{name}"
                lines = {
                    "download": (*monai, "download", "--name", name, "--url", address, "--bundle_dir", "D"),
                    "1 pair registered": (*monai, "run", *configs, "--spacing", "6", "--output_dir", name),
                    f"loaded {name}.network (1, 3, 32, 32, 32)": ("-c", LOAD.format(name=name)),
                }
                for expected, words in lines.items():
                    done = subprocess.run([python, *words], cwd=empty, env=environment, capture_output=True, text=True)
                    text = done.stdout + done.stderr
                    if done.returncode or expected not in text:
                        raise SystemExit(f"{name}: {' '.join(words)[:120]}\n{text[-3000:]}")
                print(f"{name}: downloaded, registered and loaded with nothing else installed", flush=True)
            server.shutdown()


if __name__ == "__main__":
    fire.Fire({"pins": pins, "run": run})
