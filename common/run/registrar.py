"""A bundle's inference.json from Python, for programs that register many pairs: a `monai.bundle run` each."""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow

from common import InputError
from common.run.cli import refuse_unknown
from common.run.options import FOR_INFERENCE
from common.run.values import check

# Options that no network depends on: with these the one that is loaded is kept.
OF_A_PAIR = ("moving", "fixed", "moving_label", "fixed_label", "moving_points", "fixed_points", "moving_mask")
OF_A_PAIR += ("fixed_mask", "output_dir", "prealign", "passes", "refine_steps", "refine_similarity", "save_inverse")
OF_A_PAIR += ("surface", "displacement", "report")
_ONE_AT_A_TIME = threading.Lock()  # sys.path, the progress bar and its notes belong to the process


class Registrar:
    """Registers one pair after the other with a bundle, its weights loaded once.

    Every pair is a run of `configs/inference.json` as on the command line, with the same options, so that the results
    are the same. Pairs asked for by several threads wait for each other.

    Args:
        bundle: folder of the bundle.
        options: for all pairs, by the names of inference.json, as device="cpu", refine_steps=20.

    Raises:
        InputError: not the folder of a bundle, or an option that its inference.json does not have.
    """

    def __init__(self, bundle: str | os.PathLike, **options: Any) -> None:
        self.root = Path(bundle).absolute()
        self.config = self.root / "configs" / "inference.json"
        if not self.config.is_file():
            raise InputError(f"{self.root}: not a bundle, it has no configs/inference.json")
        found = ConfigParser.load_config_files(str(self.config))
        self.defaults = {name: found[name] for name in found if not isinstance(found[name], (dict, list))}
        self.options = self._checked(options)
        self._kept: tuple[str, Any] | None = None  # options that it was made with, network

    @property
    def name(self) -> str:
        """Name of the bundle: that of its folder."""
        return self.root.name

    @property
    def description(self) -> str:
        """What metadata.json says the bundle does."""
        meta = json.loads((self.root / "configs" / "metadata.json").read_text(encoding="utf-8"))
        return f"{meta['name']}: {meta['description']}"

    def register(
        self, moving: str | os.PathLike, fixed: str | os.PathLike, output_dir: str | os.PathLike, **options: Any
    ) -> tuple[dict, Path]:
        """Register one pair; its files are written to OUTPUT_DIR/ID.

        Args:
            moving, fixed: the scans.
            output_dir: folder for the pair's folder and results.csv.
            options: further ones for this pair, as moving_label="labels.nii.gz".

        Returns:
            The pair's row of results.csv, and its folder.

        Raises:
            InputError: what the command line says about an input or an option; other errors as they come.
        """
        paths = {"moving": moving, "fixed": fixed, "output_dir": output_dir}
        asked = self.options | self._checked(options | {name: os.path.abspath(path) for name, path in paths.items()})
        lasting = json.dumps({n: v for n, v in asked.items() if n not in OF_A_PAIR}, sort_keys=True, default=str)
        with _ONE_AT_A_TIME, _own_search_path():
            kept = {"network": self._kept[1]} if self._kept and self._kept[0] == lasting else {}
            workflow = ConfigWorkflow(
                str(self.config),
                logging_file=False,
                workflow_type="inference",
                bundle_root=str(self.root),
                **kept,
            )
            # `take_options` gives them to the parser as values: in the config itself they would be text to evaluate.
            workflow.given_options = {"bundle_root": str(self.root)} | asked
            workflow.initialize()
            workflow.run()
            workflow.finalize()
            self._kept = lasting, workflow.parser.get_parsed_content("network")
            (row,) = workflow.evaluator.state.rows
            # An engine and its handlers hold each other until they are collected: not the scans of the pair with them.
            workflow.evaluator.state.batch = workflow.evaluator.state.output = None
        return row, Path(asked["output_dir"]) / row["id"]

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        for name in options:
            refuse_unknown(name, name, self.defaults)
        plain = {name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in options.items()}
        known = {n: v for n, v in plain.items() if n in FOR_INFERENCE and (v is not None or self.defaults[n])}
        return plain | {name: check(name, FOR_INFERENCE[name], value) for name, value in known.items()}


@contextlib.contextmanager
def _own_search_path() -> Iterator[None]:
    """Every run puts the bundle's folder on the module search path; afterwards it is as it was."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before
