"""What a run says: whole lines in a log, one that changes in a terminal, nothing when asked to be quiet."""

import pytest

from common.run import progress


@pytest.fixture(autouse=True)
def clean():
    yield
    progress.close()
    progress.take()
    progress.hush(False)


def three_pairs() -> None:
    progress.start(3, "register")
    for n in range(3):
        progress.stage("loading")
        progress.say("forecast")
        progress.stage("refining")
        progress.step(1, 50)
        progress._run.begun -= 100  # as if it had taken so long
        progress.advance(f"p{n}: plausible")
    progress.close()


def test_a_log_has_whole_lines_and_the_time_left(capsys: pytest.CaptureFixture) -> None:
    three_pairs()
    assert capsys.readouterr().err.splitlines() == [
        "register pair 1 of 3: loading",
        "forecast",
        "register pair 1 of 3: refining",
        "register pair 1 of 3: p0: plausible, about 3 min left",
        "register pair 2 of 3: p1: plausible, about 2 min left",
        "register pair 3 of 3: p2: plausible",
    ]


def test_a_stage_that_lasts_is_said_again(capsys: pytest.CaptureFixture) -> None:
    progress.start(1, "register")
    progress.expect(100.0)
    progress.stage("refining")
    progress.step(10, 50)
    progress._run.told -= 60
    progress.step(11, 50)
    assert capsys.readouterr().err.splitlines() == [
        "register: refining, about 2 min left",
        "register: refining 11 of 50, about 2 min left",
    ]


def test_a_terminal_has_one_line(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    three_pairs()
    said = capsys.readouterr().err
    assert said.count("\n") == 4 and said.count("\r\x1b[2K") > 6 and said.endswith("\r\x1b[2K")


def test_quiet(capsys: pytest.CaptureFixture) -> None:
    progress.hush(True)
    three_pairs()
    progress.tell("summary")
    assert list(progress.counted(range(6), "load", "scan")) == list(range(6))
    assert capsys.readouterr() == ("", "")


def test_counted_says_where_it_is(capsys: pytest.CaptureFixture) -> None:
    list(progress.counted(range(6), "load", "scan"))
    assert capsys.readouterr().err == "load scan 1 of 6: reading\n"
    list(progress.counted(range(4), "load", "scan"))
    assert capsys.readouterr().err == ""


WORDS = {4.4: "4 s", 89: "89 s", 95: "2 min", 5399: "1 h 30 min", 7500: "2 h 05 min"}


@pytest.mark.parametrize("seconds, words", WORDS.items())
def test_durations(seconds: float, words: str) -> None:
    assert progress.duration(seconds) == words
