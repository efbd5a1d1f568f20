"""What a request means: ids to files, options, names; and the sentences. Needs no MONAI Label."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from common import InputError
from common.label import requests
from common.label.requests import Pair, bundle_options, label_names, labelled, plain, resolve


class FakeStudies:
    """Scans by id, each with the tags of its labels."""

    def __init__(self, **tags: list[str]) -> None:
        self.tags = tags

    def list_images(self) -> list[str]:
        return list(self.tags)

    def get_image_uri(self, image_id: str) -> str:
        return f"/studies/{image_id}.nii.gz"

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        return f"/studies/labels/{label_tag}/{label_id}.nii.gz"

    def get_labels_by_image_id(self, image_id: str) -> dict[str, str]:
        return {tag: image_id for tag in self.tags[image_id]}


STUDIES = FakeStudies(patient=[], atlas=["final"], draft=["original"], both=["original", "final"])


def test_labelled() -> None:
    assert labelled(STUDIES) == ["atlas", "both"]
    assert labelled(STUDIES, "original") == ["both", "draft"]


def test_ids_become_files() -> None:
    asked = {"image": "patient", "moving": "atlas"}
    scans = ("/studies/patient.nii.gz", "/studies/atlas.nii.gz")
    assert resolve(asked, STUDIES, label=True) == Pair(*scans, "/studies/labels/final/atlas.nii.gz")
    assert resolve(asked, STUDIES, label=False) == Pair(*scans)
    tagged = resolve({"image": "patient", "moving": "both", "moving_tag": "original"}, STUDIES, label=True)
    assert tagged.moving_label == "/studies/labels/original/both.nii.gz"


def test_lesions_are_labels_with_a_tag() -> None:
    """Of either scan; a tag that none has is a mistake, none at all is not."""
    studies = FakeStudies(patient=["lesion"], atlas=["final"], ill=["lesion"])
    asked = {"image": "patient", "moving": "atlas", "lesion_tag": "lesion"}
    assert resolve(asked, studies, label=True).lesions == {"fixed_lesion": "/studies/labels/lesion/patient.nii.gz"}
    both = resolve(asked | {"moving": "ill"}, studies, label=False).lesions
    assert both["moving_lesion"] == "/studies/labels/lesion/ill.nii.gz" and len(both) == 2
    assert resolve({"image": "patient", "moving": "ill"}, studies, label=False).lesions == {}
    with pytest.raises(InputError, match="^lesion_tag: neither of the two scans has a label 'cut'$"):
        resolve(asked | {"lesion_tag": "cut"}, studies, label=True)
    assert bundle_options({"lesion_margin": "3.5"})["lesion_margin"] == 3.5
    with pytest.raises(InputError, match="lesion_margin: must be a number of mm from 0 to 1000, got 'wide'"):
        bundle_options({"lesion_margin": "wide"})


def test_only_choice_needs_no_name() -> None:
    """One labelled scan: nothing to choose. Clients send the drop-down as a list where nothing was chosen."""
    asked = {"image": "patient", "moving": ["draft"], "moving_tag": "original"}
    one = FakeStudies(patient=[], draft=["original"])
    assert resolve(asked, one, label=True).moving == "/studies/draft.nii.gz"
    with pytest.raises(
        InputError, match="^moving: choose the scan to register, there are 2 scans with a label 'final'$"
    ):
        resolve({"image": "patient", "moving": ["atlas", "both"]}, STUDIES, label=True)
    with pytest.raises(InputError, match="there are 3 other scans$"):
        resolve({"image": "patient"}, STUDIES, label=False)


def test_session(tmp_path: Path) -> None:
    """A scan that the host keeps for a client; nothing beside that folder, by whatever way it is named."""
    for name in ("sessions/1/scan.nii.gz", "private.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    sessions = tmp_path / "sessions"
    asked = {"image": str(sessions / "1" / "scan.nii.gz"), "moving": "atlas"}
    assert resolve(asked, STUDIES, label=False, sessions=sessions).fixed == asked["image"]
    with pytest.raises(InputError, match="image: no scan of the studies has the id"):
        resolve(asked, STUDIES, label=False)
    with pytest.raises(InputError, match="image: no scan of the studies has the id"):
        resolve(asked | {"image": f"{sessions}/1/../../private.nii.gz"}, STUDIES, label=False, sessions=sessions)


def test_upload_is_the_only_path(tmp_path: Path) -> None:
    """A file of the host's in its private folder; not one that is called so elsewhere, or lies there otherwise."""
    uploads, elsewhere = tmp_path / "uploads", tmp_path / "elsewhere"
    for folder in (uploads / "below", elsewhere):
        folder.mkdir(parents=True)
    upload = uploads / "tmpa1b2c3.nii.gz"
    upload.touch()
    asked = {"image": str(upload), "moving": "atlas"}
    assert resolve(asked, STUDIES, label=False, uploads=uploads).fixed == str(upload)
    paths = [elsewhere / upload.name, uploads / "registration_a1.nii.gz", uploads / "below" / upload.name]
    for path in paths:
        path.touch()
    (uploads / "tmplink.nii.gz").symlink_to(paths[0])
    paths += [uploads / "tmplink.nii.gz", uploads, uploads / "tmpgone.nii.gz", uploads / "x\0", Path(__file__)]
    for path in paths:
        with pytest.raises(InputError, match="^image: no scan of the studies has the id"):
            resolve(asked | {"image": str(path)}, STUDIES, label=False, uploads=uploads)
    with tempfile.NamedTemporaryFile(suffix=".nii.gz") as other:  # of another program on the same machine
        for folder in (None, uploads):
            with pytest.raises(InputError, match="^image: no scan of the studies has the id"):
                resolve(asked | {"image": other.name}, STUDIES, label=False, uploads=folder)
    with pytest.raises(InputError, match="^moving: no scan of the studies has the id"):
        resolve({"image": "patient", "moving": str(upload)}, STUDIES, label=False, uploads=uploads)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"moving": "atlas"}, "image: no scan is named"),
        (
            {"image": "nobody", "moving": "atlas"},
            "image: no scan of the studies has the id 'nobody'; there are 4, as 'atlas'",
        ),
        ({"image": "patient", "moving": "nobody"}, "moving: no scan of the studies has the id 'nobody'; .*"),
        ({"image": "atlas", "moving": "atlas"}, "atlas: is the fixed and the moving scan at once, .*"),
        ({"image": "patient", "moving": "draft"}, "draft: has no label 'final' to propagate, only 'original'"),
        ({"image": "atlas", "moving": "patient"}, "patient: has no label 'final' to propagate, none at all"),
        ({"image": "patient", "moving": "ghost"}, "moving: there is a label of 'ghost' among the studies, but not .*"),
    ],
)
def test_sentences(tmp_path: Path, asked: dict, sentence: str) -> None:
    (tmp_path / "labels" / "final").mkdir(parents=True)
    (tmp_path / "labels" / "final" / "ghost.nii.gz").touch()
    with pytest.raises(InputError, match=f"^{sentence}$"):
        resolve(asked, STUDIES, label=True, folder=tmp_path)


def test_options() -> None:
    assert bundle_options({}) == {"prealign": "affine", "refine_steps": 0}
    unchosen = {"prealign": list(requests.PREALIGN), "refine_steps": 0}
    assert bundle_options(unchosen) == bundle_options({})
    assert bundle_options({"prealign": "rigid", "refine_steps": "20"}) == {"prealign": "rigid", "refine_steps": 20}


@pytest.mark.parametrize(
    "wrong", [{"refine_steps": v} for v in ("$exit()", "1.5", -1, 1001, None)] + [{"prealign": "$exit()"}]
)
def test_options_refused(wrong: dict) -> None:
    """Also code, which MONAI's configs would run."""
    with pytest.raises(InputError, match=f"^{next(iter(wrong))}: must be "):
        bundle_options(wrong)


def test_names() -> None:
    label = np.zeros((2, 2, 2))
    label[0, 0] = 7, 12
    label[1, 1, 1] = 3
    assert list(label_names(label, {"putamen": 7, "absent": 9}).items()) == [
        ("label_3", 3),
        ("putamen", 7),
        ("label_12", 12),
    ]


def test_row_is_json() -> None:
    assert plain({"dice": float("nan"), "tre": float("inf"), "id": "a", "n": 1.5}) == {
        "dice": None,
        "tre": None,
        "id": "a",
        "n": 1.5,
    }
