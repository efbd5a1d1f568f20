"""`python -m common deploy run`: its words reach the app as options that every bundle has. Without the SDK."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from common.__main__ import main
from common.run.options import FOR_INFERENCE


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command hands to the app, in whose place stands a function."""
    found: dict[str, Any] = {}

    def run_pair(*places: str, **options: Any) -> Path:
        found.update(options, places=places)
        return Path(places[3], "moving_to_fixed")

    app = types.ModuleType("common.deploy.pair_app")
    app.run_pair = run_pair
    monkeypatch.setitem(sys.modules, "common.deploy.pair_app", app)
    return found


PLACES = ("--fixed", "a", "--moving", "b", "--bundle", "sacb_net", "--output", "out")


def deploy(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["common", "deploy", "run", *PLACES, *words])
    main()


def test_what_is_not_given_is_not_asked_for(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    deploy(monkeypatch)
    assert asked["places"] == ("a", "b", "sacb_net", "out")
    rest = {name: value for name, value in asked.items() if name != "places"}
    assert rest == {"fixed_series": "", "moving_series": "", "prealign": "affine", "refine_steps": 0}


def test_lesions_points_and_visits(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    words = {
        "fixed_lesion": "cut.nii.gz",
        "moving_lesion": "tumour.nii.gz",
        "lesion_margin": 3.5,
        "fixed_points": "f.csv",
        "moving_points": "m.mrk.json",
        "guide": 0.1,
        "holdout_points": 0.0,
        "midspace": True,
        "refine_steps": 50,
    }
    deploy(monkeypatch, *(f"--{name}={value}" for name, value in words.items()))
    assert {name: asked[name] for name in words} == words
    assert set(words) <= set(FOR_INFERENCE), "the options of a pair, by their names"


def test_another_action_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["common", "deploy", "walk", *PLACES])
    with pytest.raises(SystemExit, match="error: deploy walk: there is only `deploy run`"):
        main()
