"""The interface of nipype: its command line is the front door's, its outputs are the files of the pair."""

import sys
from pathlib import Path

import pytest
from people import SPACING, label_of, write_person

pytest.importorskip("nipype", reason="nipype is not installed")

from nipype import Node  # noqa: E402

from common.adapters.nipype_interface import OF_PAIR, Register  # noqa: E402
from common.run.door import _options  # noqa: E402
from common.run.options import FOR_INFERENCE  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]


def test_inputs_are_options_by_name() -> None:
    known = {*FOR_INFERENCE, "method"}
    own = set(Register.input_spec().get()) - {"args", "environ"}
    assert own <= known and {"moving", "fixed", "output_dir"} < own


def test_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in its own folder, and the outputs that were not asked for are undefined."""
    for seed, name in enumerate(("moving", "fixed")):
        write_person(tmp_path, name, seed)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    interface = Register(
        moving=str(tmp_path / "moving.nii.gz"),
        fixed=str(tmp_path / "fixed.nii.gz"),
        moving_label=str(label_of(tmp_path, "moving")),
        method="samconvex",
        refine_steps=2,
        args=f"--features mind --spacing {SPACING} --device cpu",
    )
    words = interface.cmdline.split()
    assert words[:4] == [sys.executable, "-m", "common", "register"]
    given = _options(words[4:])
    assert given["refine_steps"] == "2" and given["features"] == "mind" and given["method"] == "samconvex"
    node = Node(interface, name="register", base_dir=str(tmp_path / "work"))
    outputs = node.run().outputs
    folder = tmp_path / "work" / "register" / "registration" / "moving_to_fixed"
    assert outputs.verdict in ("plausible", "doubtful")
    for name in ("warped_image", "transform", "warped_label", "report"):
        assert Path(getattr(outputs, name)) == folder / OF_PAIR[name] and (folder / OF_PAIR[name]).is_file()
    assert not isinstance(outputs.inverse_transform, str)
