"""The requirements of the two hosts: the versions that work together, and with which the tests of the hosts run."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest

COMMON = Path(__file__).resolve().parents[2] / "common"
HOSTS = {"label": "monailabel", "deploy": "monai.deploy"}


def lines_of(host: str) -> list[str]:
    lines = (COMMON / host / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("host", HOSTS)
def test_every_version_is_given(host: str) -> None:
    lines = lines_of(host)
    assert lines and [line for line in lines if not re.fullmatch(r"[\w.-]+==[0-9]+([.][0-9]+)*", line)] == []


@pytest.mark.parametrize("host", HOSTS)
def test_they_are_those_of_the_tests(host: str) -> None:
    if importlib.util.find_spec(HOSTS[host]) is None:
        pytest.skip(f"{HOSTS[host]} is not installed")
    given = dict(line.split("==") for line in lines_of(host))
    found = {name: importlib.metadata.version(name).partition("+")[0] for name in given}  # torch 2.13.0+cpu
    assert found == given
