"""summary.png: a cohort at a glance."""

from pathlib import Path

from common.quality.paint import BLUE, GREY, ORANGE
from common.quality.picture import MEASURES


def draw_summary(rows: list[dict], path: Path) -> None:
    """A cohort: every measure of every pair before and after, folding, and the pairs that failed or are doubtful."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows = [{name: value for name, value in row.items() if value != ""} for row in rows]  # as read from a table
    done = [row for row in rows if row.get("ncc_after") is not None]
    names = [name for name in MEASURES if any(row.get(f"{name}_after") is not None for row in done)]
    figure = Figure(figsize=(4 * (len(names) + 1), max(3.5, 0.22 * len(rows) + 1.8)), layout="constrained")
    axes = figure.subplots(1, len(names) + 1, sharey=True, squeeze=False)[0]
    ids = [str(row["id"]) for row in rows]
    for axes_, name in zip(axes, names):
        for n, row in enumerate(rows):
            before, after = row.get(f"{name}_before"), row.get(f"{name}_after")
            if before is not None and after is not None:
                axes_.plot([before, after], [n, n], color=GREY, linewidth=1, zorder=1)
                axes_.scatter(before, n, s=26, facecolor="white", edgecolor=BLUE, zorder=2)
                axes_.scatter(after, n, s=26, color=BLUE, zorder=3)
        axes_.set_xlabel(f"{MEASURES[name][0]}, {MEASURES[name][1]}")
    for n, row in enumerate(rows):
        if row.get("folding_pct") is not None:
            axes[-1].barh(n, row["folding_pct"], color=GREY)
        if row.get("error") or row.get("warnings"):
            colour, words = ("black", "failed") if row.get("error") else (ORANGE, "doubtful")
            axes[0].add_patch(
                Rectangle((0, n - 0.5), 1, 1, transform=axes[0].get_yaxis_transform(), color=colour, alpha=0.15)
            )
            axes[-1].text(0.98, n, words, transform=axes[-1].get_yaxis_transform(), ha="right", va="center", fontsize=8)
    axes[-1].set_xlabel("folding (%)")
    axes[0].set(yticks=range(len(rows)), yticklabels=ids, ylim=(len(rows) - 0.5, -0.5))
    axes[0].tick_params(axis="y", labelsize=7)
    failed = sum(bool(row.get("error")) for row in rows)
    doubtful = sum(bool(row.get("warnings")) for row in done)
    text = f"{len(done)} pairs registered, {failed} failed, {doubtful} doubtful; open circle before, full circle after"
    figure.suptitle(text, fontsize=11)
    figure.savefig(path, dpi=80, format="png")
