"""A bundle's inference.json from Python, for programs that register many pairs: a `monai.bundle run` each."""

import contextlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from common import InputError
from common.quality.measure import Registration
from common.quality.verdict import verdict_of
from common.run import progress
from common.run.cli import bundle_folder, refuse_unknown
from common.run.given import as_file
from common.run.options import FOR_INFERENCE
from common.run.values import check
from common.space import mapping

# Options that no network depends on: with these the one that is loaded is kept.
OF_A_PAIR = ("moving", "fixed", "moving_label", "fixed_label", "moving_points", "fixed_points", "moving_mask")
OF_A_PAIR += ("fixed_mask", "output_dir", "prealign", "passes", "refine_steps", "refine_similarity", "save_inverse")
OF_A_PAIR += ("surface", "displacement", "moving_lesion", "fixed_lesion", "lesion_margin", "guide")
OF_A_PAIR += ("holdout_points", "diffeomorphic", "report", "neurological", "quiet", "threads", "start", "midspace")
IN_MEMORY = ("moving_label", "fixed_label", "moving_mask", "fixed_mask")  # beside the scans
IN_MEMORY += ("moving_lesion", "fixed_lesion")
_ONE_AT_A_TIME = threading.Lock()  # sys.path, the progress bar and its notes belong to the process


@dataclass(frozen=True)
class Result:
    """One registered pair.

    Attributes:
        row: its line of results.csv.
        warnings: what is doubtful, in sentences.
        pair: both scans and the maps between them.
        warped: (C, I, J, K) moving scan on the fixed grid.
        warped_label: (I, J, K) moving label map, likewise; None without one.
        folder: of the pair's files; None where none were asked for.
    """

    row: dict
    warnings: list[str]
    pair: Registration
    warped: np.ndarray
    warped_label: np.ndarray | None
    folder: Path | None

    @property
    def verdict(self) -> str:
        """What report.json says: "plausible" or "doubtful"."""
        return verdict_of(self.warnings)

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) voxel -> mm in RAS, of the fixed grid: that of `warped`."""
        return self.pair.fixed_affine

    @property
    def transform(self) -> mapping.Transform:
        """Point map from the fixed space to the moving one; `transform_files.write_transform` writes it."""
        return self.pair.whole

    @property
    def displacement(self) -> np.ndarray:
        """(3, I, J, K) of `transform` on the fixed grid in mm, RAS: fixed point + displacement = moving point."""
        size = self.pair.fixed.shape[1:]
        disp = mapping.disp_of(self.pair.whole, size, self.affine)
        return np.einsum("ab,b...->a...", self.affine[:3, :3], disp).astype(np.float32)


class Registrar:
    """Registers one pair after the other with a bundle, its weights loaded once.

    Every pair is a run of `configs/inference.json` as on the command line, with the same options, so that the results
    are the same. Pairs asked for by several threads wait for each other.

    Args:
        bundle: folder of the bundle, or its name.
        config: one more config, laid over inference.json.
        options: for all pairs, by the names of inference.json, as device="cpu", refine_steps=20.

    Raises:
        InputError: not the folder of a bundle, or an option that its inference.json does not have.
    """

    def __init__(self, bundle: str | os.PathLike, *, config: str | os.PathLike = "", **options: Any) -> None:
        named = os.fspath(bundle) == os.path.basename(bundle) and not os.path.exists(bundle)
        self.root = bundle_folder(bundle) if named else Path(bundle).absolute()
        self.config = self.root / "configs" / "inference.json"
        if not self.config.is_file():
            raise InputError(f"{self.root}: not a bundle, it has no configs/inference.json")
        self.files = [str(self.config), *filter(None, [os.fspath(config)])]
        found = ConfigParser.load_config_files(self.files)
        self.defaults = {name: found[name] for name in found if not isinstance(found[name], (dict, list))}
        self.options = self._checked(options)
        self._kept: tuple[str, Any] | None = None  # options that it was made with, network
        self._delivered: Any = None  # of the last pair

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
        self,
        moving: Any,
        fixed: Any,
        output_dir: str | os.PathLike | None = None,
        *,
        verbose: bool = False,
        **options: Any,
    ) -> Result:
        """Register one pair; files are written only if a folder is given, to OUTPUT_DIR/ID.

        Args:
            moving, fixed: the scans: paths, (array, affine), tensors with an affine, images of nibabel, SimpleITK, ITK.
            output_dir: folder for the pair's folder and results.csv.
            verbose: show the bar and the summary of the command line.
            options: further ones for this pair, as moving_label="labels.nii.gz"; label maps and masks may be in memory.

        Raises:
            InputError: what the command line says about an input or an option; other errors as they come.
        """
        with tempfile.TemporaryDirectory(prefix="registration") as place:
            beside = {name: value for name, value in options.items() if name in IN_MEMORY and value is not None}
            scans = {"moving": moving, "fixed": fixed} | beside
            files = {name: as_file(name, scan, Path(place)) for name, scan in scans.items()}
            if not (output_dir is None or isinstance(output_dir, (str, os.PathLike)) and os.fspath(output_dir).strip()):
                raise InputError(f"--output_dir must be a path, got {output_dir!r}")
            where = os.path.abspath(output_dir or Path(place) / "out")
            asked = options | files | {"output_dir": where} | ({} if output_dir else {"save": False})
            (row,) = self.run(verbose=verbose, **asked)
            pair, warped, notes = self._delivered
            self._delivered = None
        row |= {name: "in memory" for name in ("moving", "fixed") if row[name].startswith(place)}
        return Result(
            row=row,
            warnings=notes,
            pair=pair,
            warped=warped.after,
            warped_label=warped.label_after,
            folder=Path(where) / row["id"] if output_dir and asked.get("save", True) else None,
        )

    def run(self, *, verbose: bool = True, **options: Any) -> list[dict]:
        """Run inference.json with these options, as the command line does: a row a pair."""
        asked = self.options | self._checked(options)
        lasting = json.dumps({n: v for n, v in asked.items() if n not in OF_A_PAIR}, sort_keys=True, default=str)
        with _ONE_AT_A_TIME, _own_process(), contextlib.nullcontext() if verbose else progress.silent():
            kept = {"network": self._kept[1]} if self._kept and self._kept[0] == lasting else {}
            options = {"workflow_type": "inference", "bundle_root": str(self.root)} | kept
            with progress.unlogged():  # that there is no logging file
                workflow = ConfigWorkflow(self.files, logging_file=False, **options)
            # `take_options` gives them to the parser as values: in the config itself they would be text to evaluate.
            workflow.given_options = {"bundle_root": str(self.root)} | asked
            workflow.initialize()
            workflow.run()
            workflow.finalize()
            self._kept = lasting, workflow.parser.get_parsed_content("network")
            rows = workflow.evaluator.state.rows
            outputs = workflow.evaluator.state.output
            self._delivered = outputs[0]["delivered"] if outputs else None
            # An engine and its handlers hold each other until they are collected: not the scans of the pair with them.
            workflow.evaluator.state.batch = workflow.evaluator.state.output = None
        return rows

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        for name in options:
            refuse_unknown(name, name, self.defaults)
        plain = {name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in options.items()}
        by_default = {name for name, value in self.defaults.items() if value is None}
        known = {n: v for n, v in plain.items() if n in FOR_INFERENCE and (v is not None or n not in by_default)}
        return plain | {name: check(name, FOR_INFERENCE[name], value) for name, value in known.items()}


@contextlib.contextmanager
def _own_process() -> Iterator[None]:
    """A run puts the bundle's folder on the module search path, and may take other threads; then all is as it was."""
    path, threads = list(sys.path), torch.get_num_threads()
    try:
        yield
    finally:
        sys.path[:] = path
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
