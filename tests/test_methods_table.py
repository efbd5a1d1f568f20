"""The README's table of methods is what the committed results say, and they belong to the weights that are shipped."""

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import bench_methods

    yield bench_methods
    sys.modules.pop("bench_methods")


def test_table_is_current(bench) -> None:
    """Otherwise: python tests/bench/bench_methods.py table --write True."""
    text = (bench.ROOT / "README.md").read_text()
    shown = text.split(bench.BEGIN)[1].split(bench.END)[0]
    assert shown == bench.markdown(json.loads(bench.RESULTS.read_text()))


def test_results_belong_to_the_weights(bench) -> None:
    """Otherwise measure those rows again: python tests/bench/bench_methods.py measure DATA --methods "..."."""
    rows = json.loads(bench.RESULTS.read_text())["rows"]
    assert set(rows) == {*bench.TOOLS, *bench.BUNDLES}
    needed = {name: options.get("features") != "mind" for name, (_, options) in bench.BUNDLES.items()}
    expected = {n: bench.checksum(bundle) if needed[n] else None for n, (bundle, _) in bench.BUNDLES.items()}
    stale = [name for name in expected if rows[name]["weights"] != expected[name]]
    assert not stale, f"measured with other weights: {stale}"


def test_results_of_the_hippocampus_belong_to_its_weights(bench) -> None:
    """By --overlay hippocampus; every bundle with such weights has a row, beside the rows of other tools."""
    rows = json.loads(bench.RESULTS.with_name("methods_hippocampus_mr.json").read_text())["rows"]
    bundles = [path.parents[1].name for path in (bench.ROOT / "bundles").glob("*/models/hippocampus.pt")]
    assert {*bundles} <= {*rows} <= {*bench.BUNDLES, *bench.TOOLS}
    expected = {n: bench.checksum(bench.BUNDLES[n][0], "hippocampus.pt") for n in rows if n in bench.BUNDLES}
    assert [n for n in expected if rows[n]["weights"] != expected[n]] == []


@pytest.mark.parametrize("name", ("accuracy", "table3", "capture", "192x160x256"))
def test_results_of_samconvex_belong_to_its_weights(bench, name: str) -> None:
    """Otherwise: python tests/bench/bench_samconvex.py."""
    content = json.loads(bench.RESULTS.with_name(f"samconvex_{name}.json").read_text())
    assert content["weights"] == bench.checksum("samconvex")


def test_results_of_dual_flownet_belong_to_its_weights(bench) -> None:
    """Otherwise: python tests/bench/bench_dual_flownet.py. The card's means are those of the pairs."""
    names = ("table2_brain", "table2_hippocampus", "consistency")
    found = {name: json.loads(bench.RESULTS.with_name(f"dual_flownet_{name}.json").read_text()) for name in names}
    rows = {name: {row["row"]: row for row in content["rows"]} for name, content in found.items()}
    card = (bench.ROOT / "bundles" / "dual_flownet" / "docs" / "README.md").read_text()
    assert rows["table2_hippocampus"]["DFN"]["weights"] == bench.checksum("dual_flownet", "hippocampus.pt")
    for name, row in rows["consistency"].items():
        assert row["weights"] == rows["table2_brain"][name]["weights"]
    for name in names[:2]:
        assert list(rows[name]) == ["GFN", "RFN", "GRFN", "DFN"]
        for row in rows[name].values():
            assert sum(row["dice_of_pairs"].values()) / len(row["dice_of_pairs"]) == pytest.approx(row["dice"])
            columns = [f"{row[key]:.3f}" for key in ("dice", "dice_coarse", "folding_pct") if key in row]
            assert " | ".join([*columns, f"{row['sdlogj']:.2f}"]) + " |" in card


def test_raw_scans_of_dual_flownet_belong_to_its_weights(bench) -> None:
    """Otherwise: python tests/bench/bench_dual_flownet.py raw. README and card say the same."""
    rows = json.loads(bench.RESULTS.with_name("dual_flownet_raw.json").read_text())["rows"]
    texts = [(bench.ROOT / path).read_text() for path in ("README.md", "bundles/dual_flownet/docs/README.md")]
    assert [row["row"] for row in rows] == ["different people", "one person"]
    for row in rows:
        assert row["weights"] == bench.checksum("dual_flownet")
        assert sum(row["dice_of_pairs"].values()) / len(row["dice_of_pairs"]) == pytest.approx(row["dice"])
        columns = [f"{row[key]:.3f}" for key in ("affine", "dice", "folding_pct")]
        assert f"| {len(row['dice_of_pairs'])} | {' | '.join(columns)} |" in texts[1]
    assert f"| {rows[0]['affine']:.3f} | 0.592 | {rows[0]['dice']:.3f} |" in texts[0]


def test_every_bundle_has_a_row(bench) -> None:
    bundles = [path.name for path in (bench.ROOT / "bundles").iterdir() if path.is_dir()]
    assert sorted({bundle for bundle, _ in bench.BUNDLES.values()}) == sorted(bundles)


def test_metadata_has_the_measured_dice(bench) -> None:
    rows = json.loads(bench.RESULTS.read_text())["rows"]
    for path in sorted((bench.ROOT / "bundles").glob("*/configs/metadata.json")):
        dice = rows[path.parents[1].name]["dice"]
        assert json.loads(path.read_text())["eval_metrics"] == {"mean_dice_brain_t1_2mm": round(dice, 3)}, path
