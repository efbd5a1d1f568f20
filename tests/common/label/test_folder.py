"""The app folder that `python -m common label init` writes. Needs no MONAI Label."""

import ast
import json
from pathlib import Path

import pytest

from common import InputError
from common.label.command import label
from common.label.folder import read_app, write_app


def test_init(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('{"background": 0, "left cortex": 1, "thalamus": 6}')
    said = label("init", str(tmp_path / "app"), "samconvex", bundles="sacb_net", labels=str(tmp_path / "names.json"))
    assert said.startswith(f"wrote {tmp_path / 'app'}; start it with: monailabel start_server --app")
    expected = {name: str(repository / "bundles" / name) for name in ("sacb_net", "samconvex")}
    assert read_app(tmp_path / "app") == {
        "bundles": expected,
        "options": {},
        "labels": {"left cortex": 1, "thalamus": 6},
    }
    tree = ast.parse((tmp_path / "app" / "main.py").read_text())
    assert [n.module for n in tree.body if isinstance(n, ast.ImportFrom)] == ["common.label.app"]


def test_init_again_keeps_what_the_server_added(tmp_path: Path) -> None:
    write_app(str(tmp_path), ["sacb_net"])
    (tmp_path / "logs").mkdir()
    write_app(str(tmp_path), ["samconvex"], options={"spacing": 3.0})
    assert list(read_app(tmp_path)["bundles"]) == ["samconvex"] and (tmp_path / "logs").is_dir()
    assert read_app(tmp_path)["options"] == {"spacing": 3.0}


@pytest.mark.parametrize(
    ("bundles", "options", "sentence"),
    [
        ([], {}, "name the bundles to offer"),
        (["sacb"], {}, "sacb: no such bundle, .*; there are .*sacb_net"),
        (["sacb_net"], {"spacin": 2}, "--spacin: there is no such option, did you mean --spacing?"),
        (["sacb_net"], {"device": "$exit()"}, "--device must be cpu or cuda:N, got .exit"),
    ],
)
def test_refused(tmp_path: Path, bundles: list[str], options: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        write_app(str(tmp_path / "app"), bundles, options=options)
    assert not (tmp_path / "app").exists()


def test_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("mine")
    with pytest.raises(InputError, match="is not empty, and no app of ours"):
        write_app(str(tmp_path), ["sacb_net"])
    assert (tmp_path / "main.py").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_faulty_files(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('["cortex"]')
    for path, sentence in (
        (tmp_path / "none.json", "no such file"),
        (tmp_path / "names.json", "must be JSON of the form"),
    ):
        with pytest.raises(InputError, match=sentence):
            write_app(str(tmp_path / "app"), ["sacb_net"], labels=str(path))
    (tmp_path / "registration.json").write_text(json.dumps({"bundles": {}}))
    with pytest.raises(InputError, match="not as `python -m common label init` writes it"):
        read_app(tmp_path)
