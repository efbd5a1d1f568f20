"""A sample of tests/bench/bad_inputs.py: every bad input or option ends in one sentence, or with a fitting warning."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import PATIENCE

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import bad_inputs  # noqa: E402
import outcomes  # noqa: E402

from common.run import words  # noqa: E402

COUNT, SEED = 60, 24


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bad_inputs.Good]:
    yield bad_inputs.Good(tmp_path_factory.mktemp("good"))


def test_a_sample_ends_good(good: bad_inputs.Good, tmp_path: Path) -> None:
    cases = bad_inputs.drawn(good, COUNT, SEED)
    assert len(cases) == len({case.name for case in cases}) == COUNT
    found = {case.name: bad_inputs.outcome(case, tmp_path / str(n), PATIENCE) for n, case in enumerate(cases)}
    bad = {name: end for name, end in found.items() if end.kind not in outcomes.GOOD}
    assert not bad, bad
    assert sum(end.kind == "refused" for end in found.values()) > 0.8 * COUNT


FOUND = {  # by a run of all that can be drawn, some 3,000
    "Registrar fixed: pipe": "refused",
    "report MOVING: pipe": "refused",
    "compose --reference: huge sizes": "refused",
    "Registrar output_dir=''": "refused",
    "Registrar weights=['a']": "refused",
    "invert --reference: zeros": "as it is",
    "invert --reference: far away": "warned",
    "compose --reference: far away": "warned",
}


def test_what_was_waited_for_silent_or_a_traceback(good: bad_inputs.Good, tmp_path: Path) -> None:
    cases = [case for family in (bad_inputs.scans, bad_inputs.options) for case in family(good) if case.name in FOUND]
    ends = {case.name: bad_inputs.outcome(case, tmp_path / str(n), PATIENCE) for n, case in enumerate(cases)}
    assert {name: end.kind for name, end in ends.items()} == FOUND, ends


def test_the_judge_sees_what_is_wrong(tmp_path: Path) -> None:
    """A traceback, silence, several sentences and a file left behind are told apart from a good end."""

    def says(text: str, code: int):
        def run() -> None:
            print(text)
            sys.exit(code)

        return run

    def fails() -> None:
        raise KeyError("x")

    def leaves() -> None:
        (tmp_path / ".host-1-0.nii").write_text("")
        sys.exit("error: a")

    def kind(run, **options: object) -> str:
        return outcomes.judged(run, out=tmp_path, **options).kind

    assert kind(says("error: a.nii: no such file", 1)) == "refused"
    assert kind(says("", 1)) == kind(fails) == kind(says("error: a\nerror: b", 1)) == "traceback"
    assert kind(says("done", 0)) == "silent" and kind(says("done", 0), harmless=True) == "as it is"
    assert kind(says("warning: little overlap", 0), fits="overlap") == "warned"
    assert kind(leaves) == "half"


@pytest.mark.parametrize(
    "line, words_of_error",
    [
        (("--bundle_root", "$print(1)"), "--bundle_root: needs the folder of the bundle, got $print(1)"),
        (("--bundle_root="), "--bundle_root: needs the folder of the bundle, got an empty word"),
        (("--moving", "$import this"), "--moving: values of a command line are never evaluated, got $import this"),
        (("--fixed=$from this import s",), "--fixed: values of a command line are never evaluated, got $from this"),
    ],
)
def test_what_monai_would_evaluate_before(monkeypatch: pytest.MonkeyPatch, line: object, words_of_error: str) -> None:
    line = (line,) if isinstance(line, str) else line
    monkeypatch.setattr(sys, "argv", ["monai.bundle", "run", "--config_file", "a.json", *line])
    with pytest.raises(SystemExit, match="^error: " + words_of_error.replace("$", r"\$").replace("(1)", r"\(1\)")):
        words.refuse_early()
