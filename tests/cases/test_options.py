"""Options: every value that an option does not take gets a sentence; one table says what each takes."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_words import ROOT, parsed, value

from common import InputError, refine
from common.run import align, forecast, options, transforms
from common.run.cli import refuse_unknown, sentence_of
from common.run.options import FOR_INFERENCE, FOR_TRAINING, TEMPLATE
from common.run.transforms import AlignAndGridd, scan_tensor
from common.run.values import check, read
from common.run.words import check_root
from common.train import labels

TAKEN = {
    ("save_inverse", "false"): False,
    ("save_inverse", "False"): False,
    ("save_inverse", "no"): False,
    ("save_inverse", "1"): True,
    ("surface", "None"): None,
    ("spacing", "0"): 0,
    ("spacing", "1.50"): 1.5,
    ("spacing", ".5"): 0.5,
    ("memory", "1e1"): 10.0,
    ("threads", "2"): 2,
    ("refine_steps", "+20"): 20,
    ("intensity_range", "[-1000,1000]"): [-1000, 1000],
    ("intensity_range", "-1000, 500.5"): [-1000, 500.5],
    ("intensity_range", "none"): None,
    ("grid_size", "(96,112,96)"): [96, 112, 96],
    ("prealign", "none"): "none",
    ("trained_on", ""): "",
    ("weights", ""): "",
    ("device", "cpu"): "cpu",
    ("groups", '{"left": {"members": [1, 2]}}'): {"left": {"members": [1, 2]}},
}
REFUSED = {
    ("save_inverse", "maybe"): "must be True or False, got maybe",
    ("save_inverse", "fasle"): "must be True or False, got fasle; did you mean False?",
    ("save_inverse", "2"): "must be True or False, got 2",
    ("passes", "0"): "must be a whole number from 1 to 50, got 0",
    ("passes", "2.0"): "must be a whole number from 1 to 50, got 2.0; did you mean 2?",
    ("passes", "[2]"): "must be a whole number from 1 to 50, got [2]",
    ("passes", "two"): "must be a whole number from 1 to 50, got two",
    ("passes", "True"): "must be a whole number from 1 to 50, got True",
    ("refine_steps", "-1"): "must be a whole number from 0 to 10000, got -1",
    ("refine_steps", "1_0"): "must be a whole number from 0 to 10000, got 1_0",
    ("refine_steps", ""): ": needs a whole number from 0 to 10000, got an empty word",
    ("refine_steps", "None"): "must be a whole number from 0 to 10000, got None",
    ("refine_steps", "1" * 90): "must be a whole number from 0 to 10000, got 1.111111111111111e+89",
    ("spacing", "nan"): "must be a number from 0 to 100, got nan",
    ("spacing", "inf"): "must be a number from 0 to 100, got inf",
    ("spacing", "1e400"): "must be a number from 0 to 100, got inf",
    ("spacing", "-1"): "must be a number from 0 to 100, got -1",
    ("spacing", "2,0"): "must be a number from 0 to 100, got 2,0",
    ("spacing", "2mm"): "must be a number from 0 to 100, got 2mm",
    ("spacing", "$2"): "must be a number from 0 to 100, got $2",
    ("threads", "0"): "must be a whole number from 1 to 1024, got 0",
    ("memory", "0"): "must be a number, 0.001 or more, got 0",
    ("minimum", "1.5"): "must be a whole number, 0 or more, got 1.5; did you mean 2?",
    ("prealign", "Affine"): "must be one of affine, rigid, none, got Affine; did you mean affine?",
    ("prealign", "xyz"): "must be one of affine, rigid, none, got xyz",
    ("intensity_range", "[5]"): "must be two numbers, [low,high] with low < high, got [5]",
    ("intensity_range", "[5,1]"): "must be two numbers, [low,high] with low < high, got [5, 1]; did you mean [1,5]?",
    ("intensity_range", "[nan,1]"): "must be two numbers, [low,high] with low < high, got ['nan', 1]",
    ("grid_size", "[96,112]"): "must be three whole numbers of voxels, got [96, 112]",
    ("grid_size", "96x112x96"): "must be three whole numbers of voxels, got 96x112x96",
    ("grid_size", "[9999,9999,9999]"): ": 9999 x 9999 x 9999 voxels are more than 2147483648",
    ("groups", "left"): "must be a list or a dictionary, got left",
    ("groups", "[1,2]"): 'must be groups of labels as {"NAME": {"members": [1, 2]}}, got [1, 2]',
    ("moving", ""): ": needs a path, got an empty word",
    ("trained_on", "brain"): "must be one of brain_t1, hippocampus, got brain; did you mean brain_t1?",
    ("device", "0"): "must be cpu or cuda:N, got 0; did you mean cuda:0?",
    ("device", "cuda:"): "must be cpu or cuda:N, got cuda:; did you mean cuda:0?",
}


@pytest.mark.parametrize("name, word", TAKEN, ids=map("-".join, TAKEN))
def test_what_is_taken(name: str, word: str) -> None:
    found = read(name, FOR_INFERENCE[name], word)
    assert found == TAKEN[name, word] and isinstance(found, type(TAKEN[name, word]))


@pytest.mark.parametrize("name, word", REFUSED, ids=lambda text: text[:20])
def test_what_is_refused(name: str, word: str) -> None:
    with pytest.raises(InputError) as caught:
        read(name, FOR_INFERENCE[name], word)
    between = "" if REFUSED[name, word].startswith(":") else " "
    assert str(caught.value) == f"--{name}{between}{REFUSED[name, word]}"


@pytest.mark.parametrize("device", ["meta", "cuda:99", "gpu", "cdua", "vulkan"])
def test_devices_that_do_not_compute(device: str) -> None:
    with pytest.raises(InputError, match=rf"--device {device}: not a device that computes here \(.+\); here is cpu"):
        read("device", FOR_INFERENCE["device"], device)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), -1.0, True, "x", [1.0], {}, (1, 2), "", object(), 10**30, np.array([1.0])],
    ids=lambda value: type(value).__name__,
)
def test_values_from_python(value: object) -> None:
    """Of a `Registrar`: no option that takes a number takes these."""
    for name, option in (FOR_INFERENCE | FOR_TRAINING).items():
        if option.kind in ("whole", "number") and not (value == -1.0 and option.low < 0):
            with pytest.raises(InputError, match=f"--{name}"):
                check(name, option, value)


def test_a_switch_alone_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parsed(monkeypatch, "--save_inverse", "--noresume", "--spacing", "3")
    found = [parser.get_parsed_content(name) for name in ("save_inverse", "resume", "spacing")]
    assert found == [True, False, 3]


WORDS = {
    ("--spacing",): "--spacing: needs a value",
    ("--moving", "--fixed", "x"): "--moving: needs a value",
    ("--passes", "1", "--passes", "2"): "--passes: is given twice",
    ("--moving", "my", "scan.nii.gz"): "scan.nii.gz: belongs to no option; a name with spaces needs quotes",
    ("--refine_step", "3"): "--refine_step: there is no such option, did you mean --refine_steps?",
    ("--features", "mind"): "--features: there is no such option here, it belongs to samconvex",
    ("--max_epochs", "3"): "--max_epochs: there is no such option here, it belongs to the training, train.json",
    ("--bad_labels", "error"): "--bad_labels: there is no such option here, it belongs to the training, train.json",
}


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_words_that_are_refused(monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    with pytest.raises(Exception) as caught:
        parsed(monkeypatch, *words)
    assert sentence_of(caught.value) == WORDS[words]


def test_an_option_without_its_side() -> None:
    """Who asks for --lesion_mask is told of both sides, not of --lesion_margin."""
    for word, meant in (("lesion_mask", "fixed_lesion"), ("mask", "fixed_mask"), ("points", "fixed_points")):
        both = f"did you mean --{meant} or --{meant.replace('fixed', 'moving')}"
        with pytest.raises(InputError, match=f"--{word}: there is no such option, {both}"):
            refuse_unknown(word, word, FOR_INFERENCE)


def test_a_wrong_bundle_root(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"network_def": {"_target_": "sacb_net.SACBNet"}}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    file = ROOT / "bundles" / "sacb_net" / "configs" / "inference.json"
    with pytest.raises(InputError) as caught:
        check_root("common", config, str(file))
    text = "--bundle_root common: is not the folder of this bundle, it holds no sacb_net; did you mean"
    assert str(caught.value) == f"{text} {ROOT / 'bundles' / 'sacb_net'}?"
    check_root(str(file.parents[1]), config, str(file))


def test_an_option_of_another_training(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception) as caught:
        parsed(monkeypatch, "--dice_weight", "1", config="train")
    assert sentence_of(caught.value) == "--dice_weight: there is no such option here, it belongs to dual_flownet"
    assert value(monkeypatch, "dice_weight", "--dice_weight", "1", config="train", bundle="dual_flownet") == 1


@pytest.mark.parametrize("kind", ["inference", "train"])
def test_the_table_has_every_key_of_the_configs(kind: str) -> None:
    """And of what is laid over them; nothing in the table is of no config."""
    table, found = {"inference": FOR_INFERENCE, "train": FOR_TRAINING}[kind], set()
    for path in sorted(ROOT.glob(f"bundles/*/configs/{kind}.json")):
        config = json.loads(path.read_text())
        keys = {name for name, value in config.items() if not isinstance(value, dict)}
        keys -= {"imports", "bundle_root", "handlers", "initialize", "run", "finalize", "embedder"}
        assert keys - set(table) == set(), path
        for name in keys:
            if not isinstance(config[name], str) or config[name][:1] not in "$@":
                assert config[name] is None or check(name, table[name], config[name]) == config[name], (path, name)
            assert not table[name].of or path.parents[1].name in table[name].of.split(", "), (path, name)
        found |= keys
    found |= {"translation", "amplitude"} if kind == "train" else set()  # of residual_aligner's pretrain.json
    assert found == set(table)


def test_the_readme_has_the_table() -> None:
    text = (ROOT / "common" / "run" / "README.md").read_text(encoding="utf-8")
    rows = "\n".join(re.findall(r"^\| (`--.*?) \|", text.replace("\\|", "/"), re.MULTILINE))
    assert set(re.findall(r"--(\w+)", rows)) - {"network_def"} == {*FOR_INFERENCE, *TEMPLATE}
    for name, option in FOR_INFERENCE.items():
        if option.kind == "word" and f"`--{name} " in rows and "/" in rows.split(f"`--{name} ")[1].split("`")[0]:
            assert rows.split(f"`--{name} ")[1].split("`")[0] == "/".join(option.words), name


def test_words_are_those_of_the_code() -> None:
    assert FOR_INFERENCE["prealign"].words == align.PREALIGN
    assert FOR_INFERENCE["refine_similarity"].words == (*refine.SIMILARITIES, "auto")
    assert FOR_INFERENCE["too_large"].words == forecast.POLICIES
    assert FOR_INFERENCE["trained_on"].words == tuple(transforms.verdict.TRAINING)
    assert FOR_TRAINING["bad_labels"].words == labels.BAD_LABELS
    assert {option.kind for option in (FOR_INFERENCE | FOR_TRAINING).values()} <= set(options.TAKES) | {"word"}


@pytest.mark.parametrize("spacing", [1e-3, 1e-300], ids=str)
def test_a_huge_grid_is_refused_before_it_is_made(tmp_path: Path, spacing: float) -> None:
    scan = torch.rand(1, 20, 20, 20).numpy()
    pair = {name: scan_tensor(scan, np.diag([3.0, 3, 3, 1]), f"{name}.nii.gz") for name in ("moving", "fixed")}
    with pytest.raises(InputError, match=f"--spacing {spacing:g}: .* voxels.*; take a larger --spacing"):
        AlignAndGridd(spacing, "none")(pair)
    assert math.isfinite(scan.sum())
