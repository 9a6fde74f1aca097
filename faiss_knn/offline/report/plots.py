"""The plots of a report."""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from faiss_knn.offline.report.content import class_scores, headline
from faiss_knn.offline.report.results import (
    Record,
    Results,
    at_common_k,
    index_name,
    pareto_names,
    searches,
    vote_of,
)

_LIGHT = {"paper": "#ffffff", "ink": "#1c2430", "soft": "#5b6675", "grid": "#dde3ea"}
_DARK = {"paper": "#12161c", "ink": "#e4e9f0", "soft": "#9aa7b8", "grid": "#2c3540"}
_LINES = ("#2f7fd0", "#e07b39", "#3aa57a", "#c2559d", "#9a8cf0", "#b8922c", "#55a9b8", "#d05a5a")
_MARKS = "osD^vPX*"
_BARS = 30
_NUMBERED = "class #"
# The first comes with matplotlib; the others have the letters of East Asia, where they are installed.
_FAMILIES = (
    "DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Noto Sans KR",
    "Source Han Sans", "IPAexGothic", "TakaoPGothic", "NanumGothic", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Droid Sans Fallback", "Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo", "Arial Unicode MS", "Unifont",
)  # fmt: skip

Style = dict[str, str]
Curve = list[tuple[int, Any]]  # k and what comes of it


def draw(report: Results) -> dict[str, Callable[[Style], Figure]]:
    """Draw the plots that a report has something for, by name."""
    plots: dict[str, Callable[[Style], Figure]] = {}
    best = headline(report)
    if len(searches(report.records)) > 1 and (costs := _cost_points(report, best)):
        common_k = next(iter(at_common_k(report.records).values()))["k"]
        plots["cost"] = lambda style: _cost(costs, common_k, style)
    if len({record["k"] for record in report.records}) > 1:
        plots["k"] = _over_k(report, best)
    if scores := class_scores(report, best):
        names = _written(report, [number for number, _ in scores[:_BARS]])
        plots["classes"] = lambda style: _classes(best, scores, names, style)
    return plots


def draw_runs(names: Sequence[str], lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> Callable[[Style], Figure]:
    """Draw top-1 accuracy with its interval along several runs, a line for each of up to eight settings.

    Args:
        names: Of the runs.
        lines: For each setting a dict of `top1`, `top1_low` and `top1_high` for each run.
    """
    shown = dict(list(lines.items())[: len(_LINES)])
    return lambda style: _runs(names, shown, style)


def png(plot: Callable[[Style], Figure]) -> bytes:
    """Render a plot on light paper as PNG."""
    out = io.BytesIO()
    plot(_LIGHT).savefig(out, format="png", dpi=160)
    return out.getvalue()


def svgs(plot: Callable[[Style], Figure]) -> tuple[str, str]:
    """Render a plot as SVG for light and for dark paper."""
    drawings = []
    for style in (_LIGHT, _DARK):
        out = io.StringIO()
        plot(style).savefig(out, format="svg", metadata={"Date": None})
        drawings.append(out.getvalue())
    return drawings[0], drawings[1]


def _axes(style: Style, title: str, height: float = 3.2) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.6, height), facecolor=style["paper"], layout="constrained")
    axes = figure.add_subplot(facecolor=style["paper"])
    axes.set_title(title, color=style["ink"], fontsize=11, loc="left")
    axes.tick_params(colors=style["soft"], labelsize=9)
    axes.grid(color=style["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(style["grid"])
    return figure, axes


def _label(axes: Any, style: Style, x: str, y: str) -> None:
    axes.set_xlabel(x, color=style["soft"], fontsize=10)
    axes.set_ylabel(y, color=style["soft"], fontsize=10)


def _over_k(report: Results, best: Record) -> Callable[[Style], Figure]:
    """Draw accuracy over k on the best record's index, a line for each weighting and temperature."""
    lines: dict[tuple[str, float], list[Record]] = {}
    for record in searches(report.records)[index_name(best)]:
        if record["weighting"] == "uniform" and record["temperature"] != best["temperature"]:
            continue  # it knows no temperature
        lines.setdefault((record["weighting"], record["temperature"]), []).append(record)
    several = len({temperature for _, temperature in lines}) > 1
    labels = [f"{how}, T = {at:g}" if several and how != "uniform" else how for how, at in lines]
    curves = [
        [(r["k"], r["top1"] if best["map"] is None else r["map"]) for r in sorted(records, key=lambda r: int(r["k"]))]
        for records in lines.values()
    ]
    title = f"{'Top-1 accuracy' if best['map'] is None else 'mAP'} over k, index {index_name(best)}"
    ks = sorted({r["k"] for r in report.records})
    return lambda style: _curves(title, labels, curves, ks, style)


def _curves(title: str, labels: Sequence[str], curves: Sequence[Curve], ks: Sequence[int], style: Style) -> Figure:
    figure, axes = _axes(style, title)
    for i, (label, curve) in enumerate(zip(labels, curves, strict=True)):
        axes.plot(
            [k for k, _ in curve], [100 * score for _, score in curve],
            color=_LINES[i % 8], marker=_MARKS[i % 8],
            markersize=5, linewidth=1.6, label=label,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(ks, [str(k) for k in ks], minor=False)
    axes.set_xticks([], minor=True)
    _label(axes, style, "k (neighbours that vote)", "percent")
    axes.legend(frameon=False, labelcolor=style["ink"], fontsize=9)
    return figure


def _cost_points(report: Results, best: Record) -> dict[str, tuple[float, float, float]]:
    """Return recall, queries per second and points of top-1 lost of each index that can be compared in all three."""
    lost = {index_name(r): 100 * r["accuracy_loss"] for r in report.records if vote_of(r) == vote_of(best)}
    compared = at_common_k(report.records)
    return {name: (compared[name]["recall"], compared[name]["qps"], lost[name]) for name in lost if name in compared}


def _runs(names: Sequence[str], lines: Mapping[str, Sequence[Mapping[str, Any]]], style: Style) -> Figure:
    figure, axes = _axes(style, "Top-1 accuracy of each run, with 95 % intervals", 3.2 + 0.2 * len(lines))
    for i, (setting, rows) in enumerate(lines.items()):
        tops = [100 * row["top1"] for row in rows]
        below, above = ([100 * abs(row["top1"] - row[end]) for row in rows] for end in ("top1_low", "top1_high"))
        aside = 0.3 * (i - (len(lines) - 1) / 2) / len(lines)  # so that intervals do not hide each other
        axes.errorbar(
            [place + aside for place in range(len(rows))], tops, yerr=[below, above], color=_LINES[i % 8],
            marker=_MARKS[i % 8], markersize=5, linewidth=1.2, capsize=2, label=setting,
        )  # fmt: skip
    most = max(20, 50 // len(names))
    short = [name if len(name) <= most else "…" + name[1 - most :] for name in names]
    turned = {"rotation": 30, "ha": "right"} if sum(map(len, short)) > 40 else {}
    axes.set_xticks(range(len(names)), short, parse_math=False, fontfamily=_fonts()[0], **turned)
    axes.margins(x=0.15)
    _label(axes, style, "", "percent")
    legend = figure.legend(frameon=False, labelcolor=style["ink"], fontsize=8, loc="outside lower left")
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _cost(costs: Mapping[str, tuple[float, float, float]], common_k: int, style: Style) -> Figure:
    points = {name: (recall, speed) for name, (recall, speed, _) in costs.items()}
    figure, axes = _axes(style, "Recall against speed, and the accuracy lost", 3.5)
    best_drawn = pareto_names(points)  # an index that was asked for with other settings has no loss here, and no dot
    line = sorted(points[name] for name in best_drawn)
    axes.plot(*zip(*line, strict=True), color=style["soft"], linewidth=1, zorder=1)
    losses = [loss for _, _, loss in costs.values()]
    dots = axes.scatter(
        *zip(*points.values(), strict=True), c=losses, cmap="viridis_r", s=70, zorder=2, edgecolors=style["ink"],
        linewidths=0.8, vmin=min(0, *losses), vmax=max(0.1, *losses),
    )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.16, y=0.16)
    bar = figure.colorbar(dots, ax=axes, pad=0.02)
    bar.set_label("top-1 lost, points", color=style["soft"], fontsize=10)
    bar.ax.tick_params(colors=style["soft"], labelsize=9)
    bar.outline.set_edgecolor(style["grid"])
    _label(axes, style, f"recall at k = {common_k}", "queries per second")
    _name_points(figure, axes, sorted(points.items(), key=lambda p: p[0] not in best_drawn), style)
    return figure


def _name_points(figure: Figure, axes: Any, points: list[tuple[str, tuple[float, float]]], style: Style) -> None:
    """Write names beside the dots where there is room, in the order given; the table names them all."""
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    figure.draw_without_rendering()  # places are known once the layout is
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform([place for _, place in points])]
    for name, place in points:
        for offset, align in (((0, 8), "center"), ((0, -15), "center"), ((8, -3), "left"), ((-8, -3), "right")):
            text = axes.annotate(
                name, place, xytext=offset, textcoords="offset points", ha=align, fontsize=8, color=style["ink"],
                parse_math=False,
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            if axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max) and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()


def _classes(best: Record, scores: Sequence[tuple[int, float]], names: Sequence[str], style: Style) -> Figure:
    shown = scores[:_BARS]
    which = f"the {_BARS} lowest of {len(scores):,} classes" if len(scores) > _BARS else "by class"
    what = "Average precision" if best["map"] is not None else "Top-1"
    figure, axes = _axes(style, f"{what}, {which}", max(2.2, 0.9 + 0.2 * len(shown)))
    axes.barh(range(len(shown)), [100 * score for _, score in shown], color=_LINES[0], height=0.7)
    axes.set_yticks(range(len(shown)), names, parse_math=False, fontfamily=_fonts()[0])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 100)
    by_number = any(name.startswith(_NUMBERED) for name in names)
    _label(axes, style, f"percent ({_NUMBERED}: no font here has its name's letters)" if by_number else "percent", "")
    return figure


def _written(report: Results, numbers: Sequence[int]) -> list[str]:
    """Write classes' names, or their numbers where no font of this machine has the letters."""
    ids = [report.class_ids[number] if report.class_ids else number for number in numbers]
    names = [" ".join(name.split()) for name in report.class_names_of(numbers)]
    return [_short(name) if _has_letters(name) else f"{_NUMBERED}{id_}" for name, id_ in zip(names, ids, strict=True)]


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _has_letters(name: str) -> bool:
    """Tell whether a font of this machine has all letters of a name."""
    return all(ord(letter) in _fonts()[1] for letter in name)


@cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """Find the families to write names with, and the code points that one of them has."""
    here = {font.name for font in fontManager.ttflist}
    families = [name for name in _FAMILIES if name in here]
    return families, frozenset(code for name in families for code in get_font(findfont(name)).get_charmap())
