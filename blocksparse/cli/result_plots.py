"""Two plots of finished runs: accuracy against milliseconds, and against bytes, as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from blocksparse.cli.result_groups import Group, Network, labels
from blocksparse.cli.result_labels import box, place_labels

__all__ = ["against_bytes", "against_latency", "draw"]

# Okabe and Ito's colours, which people with any kind of colour vision tell apart; black is kept
# for the dense network, and yellow is left out: too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # 6 colours, 7 markers: 42 series before they repeat
DENSE_MARKERS = ("*", "p", "h", "8")
LABEL_SIZE = 8  # points
LEADER_FROM = 14  # pixels between mark and label


@dataclass(frozen=True)
class Point:
    """One mark: where, how far its seeds spread, and what stands beside it.

    Accuracies are in percent; `x` is in the unit of its axis.
    """

    x: float
    y: float
    low: float
    high: float
    label: str
    trusted: bool
    sparsity: float = 0.0


@dataclass(frozen=True)
class Series:
    """Points of one pattern in one network, or the dense network, drawn alike."""

    title: str
    points: tuple[Point, ...]
    dense: bool = False
    origin: Point | None = None  # the dense network it was pruned from


def against_latency(groups: Sequence[Group]) -> str:
    """Return accuracy against milliseconds per image as the text of an SVG file."""
    series = _series(
        groups,
        lambda group: group.time(lambda run: run.ms),
        lambda members: float(np.median([m.time(lambda run: run.dense_ms) for m in members])),
        timed=True,
    )
    threads = sorted({run.threads for group in groups for run in group.runs})
    count = f"{' or '.join(map(str, threads))} thread{'' if threads == [1] else 's'}"
    axis = f"time per image in blocksparse, ms (batch 1, {count}, median)"
    return svg(draw(series, axis), "Top-1 accuracy against time per image")


def against_bytes(groups: Sequence[Group]) -> str:
    """Return accuracy against the bytes of the exported file as the text of an SVG file."""
    unit, size = _unit(max(run.dense_bytes for group in groups for run in group.runs))
    series = _series(
        groups,
        lambda group: group.mean(lambda run: run.file_bytes) / size,
        lambda members: float(
            np.median([m.mean(lambda run: run.dense_bytes) / size for m in members])
        ),
        timed=False,
    )
    axis = f"exported file (dense network: checkpoint), {unit}"
    return svg(draw(series, axis), "Top-1 accuracy against bytes")


def _unit(count: int) -> tuple[str, float]:
    return ("MB", 1e6) if count >= 1e6 else ("kB", 1e3)


def _series(
    groups: Sequence[Group],
    x: Callable[[Group], float],
    dense_x: Callable[[Sequence[Group]], float],
    *,
    timed: bool,
) -> list[Series]:
    """Return the dense networks, each followed by the patterns it was pruned to."""
    networks: dict[Network, list[Group]] = {}
    for group in groups:
        networks.setdefault(group.first.network, []).append(group)
    names = labels(list(networks))
    found = []
    for network, members in sorted(networks.items(), key=lambda item: names[item[0]]):
        # Quiet runs know how fast the dense network is, if there are any.
        quiet = [group for group in members if not group.busy] or members
        dense = [100 * run.dense for group in members for run in group.runs]
        start = Point(
            x=dense_x(quiet if timed else members),
            y=float(np.mean(dense)),
            low=min(dense),
            high=max(dense),
            label="dense",
            trusted=not timed or not quiet[0].busy,
        )
        found.append(Series(f"{names[network]}, dense", (start,), dense=True))
        for pattern in sorted({group.first.pattern for group in members}):
            points = []
            for group in members:
                if group.first.pattern != pattern:
                    continue
                low, high = group.span(lambda run: 100 * run.top1)
                sparsity = group.mean(lambda run: run.sparsity)
                points.append(
                    Point(
                        x=x(group),
                        y=100 * group.mean(lambda run: run.top1),
                        low=low,
                        high=high,
                        label=f"{100 * sparsity:.0f} %",
                        trusted=not timed or not group.busy,
                        sparsity=sparsity,
                    )
                )
            points.sort(key=lambda point: (point.sparsity, point.x, point.y))
            found.append(Series(f"{names[network]}, {pattern}", tuple(points), origin=start))
    return found


def draw(series: Sequence[Series], x_label: str) -> Figure:
    """Draw series of points, labels beside them.

    Parameters
    ----------
    series
        In the order of the legend.
    x_label
        What the horizontal axis shows, with its unit.
    """
    rows = (len(series) + 3) // 2  # of the legend
    figure = Figure(figsize=(8, 4.4 + 0.21 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)  # knows how large a text is, which the labels below need
    axes = figure.add_subplot()
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(x_label)
    axes.set_ylabel("top-1 accuracy, %")
    handles, marks = [], []
    dense, others = 0, 0
    for number, line in enumerate(series):
        if line.dense:
            colour, marker, size = "black", DENSE_MARKERS[dense % len(DENSE_MARKERS)], 11
            dense += 1
        else:
            colour, marker, size = COLOURS[others % 6], MARKERS[others % 7], 7
            others += 1
            _join(axes, line, colour)
        for place, point in enumerate(line.points):
            axes.errorbar(
                point.x,
                point.y,
                yerr=[[max(point.y - point.low, 0)], [max(point.high - point.y, 0)]],  # rounding
                fmt=marker,
                color=colour,
                markerfacecolor=colour if point.trusted else "white",
                markersize=size,
                elinewidth=1.2,
                capsize=3 if point.high > point.low else 0,
                zorder=3,
            )[0].set_gid(f"point-{number}-{place}")
            marks.append((point, size))
        handles.append(Line2D([], [], linestyle="", marker=marker, color=colour, label=line.title))
    if any(point.high > point.low for point, _ in marks):
        note = "bar: lowest to highest of several seeds"
        handles.append(Line2D([], [], linestyle="", marker="|", color="0.4", label=note))
    if any(not point.trusted for point, _ in marks):
        note = "hollow: machine was busy, time not to be trusted"
        hollow = Line2D([], [], linestyle="", marker="o", color="0.4", mfc="white", label=note)
        handles.append(hollow)
    _set_scale(axes, [point for point, _ in marks])
    # Below the axes, where it can hide nothing however many series there are.
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    _write_labels(figure, axes, marks)
    return figure


def _join(axes: Axes, line: Series, colour: str) -> None:
    """Join the dense network and the best point of each sparsity, in the order of sparsity."""
    best: dict[int, Point] = {}
    for point in line.points:
        rung = round(100 * point.sparsity)
        if rung not in best or point.y > best[rung].y:
            best[rung] = point
    path = [*([line.origin] if line.origin else []), *(best[rung] for rung in sorted(best))]
    axes.plot(
        [point.x for point in path],
        [point.y for point in path],
        color=colour,
        linewidth=1,
        alpha=0.45,
        zorder=2,
    )


def _set_scale(axes: Axes, points: Sequence[Point]) -> None:
    """Start at zero, so that lengths compare; on logarithms where the points lie far apart."""
    values = [point.x for point in points]
    if max(values) > 12 * min(values):
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 1.4, max(values) * 1.4)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_xlim(0, 1.1 * max(values))
    low, high = min(point.low for point in points), max(point.high for point in points)
    margin = max(0.08 * (high - low), 0.2)
    axes.set_ylim(low - margin, high + margin)


def _write_labels(figure: Figure, axes: Axes, marks: Sequence[tuple[Point, float]]) -> None:
    """Write the labels of marks, whose sizes are in typographic points, where they cover nothing.

    One that has to stand further off is tied to its mark by a line.
    """
    figure.draw_without_rendering()  # settles where everything is
    figure.set_layout_engine("none")
    pixels = figure.dpi / 72  # of one typographic point
    places = axes.transData.transform([(point.x, point.y) for point, _ in marks])
    obstacles, texts, sizes = [], [], []
    for place, (point, size) in zip(places, marks, strict=True):
        obstacles.append(box(place, np.full(2, size * pixels)))
        low, high = axes.transData.transform([(point.x, point.low), (point.x, point.high)])
        obstacles.append(box((low + high) / 2, high - low + (8, 0)))
        text = axes.annotate(
            point.label,
            (point.x, point.y),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=LABEL_SIZE,
            color="0.15",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
            zorder=4,
        )
        texts.append(text)
        written = text.get_window_extent()
        sizes.append((written.width + 2, written.height + 2))  # and some air
    for line in axes.lines:
        if line.get_linestyle() == "-":  # the lines of `_join`, as a row of dots
            ends = axes.transData.transform(line.get_xydata())
            for start, end in pairwise(ends):
                steps = np.linspace(0, 1, 2 + int(np.hypot(*(end - start)) / 5))[:, None]
                obstacles.extend(box(start + steps * (end - start), np.full((1, 2), 2.0)))
    inside = np.array(axes.get_window_extent().extents)
    middles = place_labels(places, np.array(sizes), np.array(obstacles), inside)
    back = axes.transData.inverted()
    for text, place, middle, extent in zip(texts, places, middles, sizes, strict=True):
        text.set_position(tuple((middle - place) / pixels))
        if np.hypot(*np.maximum(abs(middle - place) - np.array(extent) / 2, 0)) > LEADER_FROM:
            ends = back.transform([place, middle]).T
            axes.plot(*ends, color="0.5", linewidth=0.6, zorder=2.5, scalex=False, scaley=False)


def svg(figure: Figure, title: str) -> str:
    """Return a figure as SVG, the same text for the same figure: no date, no random names."""
    text = io.StringIO()
    # Letters as outlines: the picture looks alike wherever it is shown.
    with matplotlib.rc_context({"svg.hashsalt": "blocksparse", "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    return text.getvalue()
