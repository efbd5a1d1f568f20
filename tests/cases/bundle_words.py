"""The words of `python -m monai.bundle run` through fire and MONAI in this process, up to the values of the options."""

import sys
from pathlib import Path
from typing import Any

import fire
import pytest
from monai.bundle import ConfigWorkflow

ROOT = Path(__file__).resolve().parents[2]


def parsed(patch: pytest.MonkeyPatch, *words: str, bundle: str = "sacb_net", config: str = "inference") -> Any:
    """The parser of a bundle's config after "initialize", as the command line makes it."""
    root = ROOT / "bundles" / bundle
    where = ["--config_file", str(root / "configs" / f"{config}.json"), "--bundle_root", str(root)]
    line = ["monai.bundle", "run", *where, *words]
    patch.setattr(sys, "argv", line)
    patch.setattr(sys, "path", list(sys.path))
    patch.setattr(sys, "excepthook", sys.excepthook)
    found = []

    def run(run_id: str | None = None, config_file: str | None = None, **override: Any) -> None:
        workflow = ConfigWorkflow(config_file, logging_file=False, workflow_type=config, **override)
        workflow.initialize()
        found.append(workflow.parser)

    fire.Fire({"run": run}, command=line[1:], name="monai.bundle")
    return found[0]


def value(patch: pytest.MonkeyPatch, name: str, *words: str, **where: str) -> Any:
    """What the option `name` is after the words."""
    return parsed(patch, *words, **where).get_parsed_content(name)
