"""Two plots of finished runs: accuracy against milliseconds, and against bytes, as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from blocksparse.cli.result_groups import Group, Network, labels

__all__ = ["against_bytes", "against_latency", "draw"]

# Okabe and Ito's colours, which people with any kind of colour vision tell apart; black is kept
# for the dense network, and yellow is left out: too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # 6 colours, 7 markers: 42 series before they repeat
DENSE_MARKERS = ("*", "p", "h", "8")
LABEL_SIZE = 8  # points
CLEARANCE = 2.0  # pixels at 100 dpi, around labels and markers
# Where a label may stand, offsets in points from its mark: near first, right before left.
DIRECTIONS = [np.pi * turn / 8 for turn in (0, 1, -1, 8, 7, 9, 2, -2, 4, -4, 6, -6, 3, -3, 5, -5)]
OFFSETS = [
    (far * np.cos(angle), far * np.sin(angle))
    for far in (9, 14, 20, 28, 38, 50, 64, 80)
    for angle in DIRECTIONS
]
LEADER_FROM = 14  # points; a label that stands further off is tied to its mark by a line


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
    figure = Figure(figsize=(8, 5.4), dpi=100, layout="constrained")
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
            marks.append((point, colour, size))
        handles.append(Line2D([], [], linestyle="", marker=marker, color=colour, label=line.title))
    if any(not point.trusted for point, _, _ in marks):
        handles.append(
            Line2D(
                [],
                [],
                linestyle="",
                marker="o",
                color="0.4",
                markerfacecolor="white",
                label="hollow: machine was busy, time not to be trusted",
            )
        )
    _set_scale(axes, [point for point, _, _ in marks])
    # Below the axes, where it can hide nothing however many series there are.
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    _place_labels(figure, axes, marks)
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


def _place_labels(
    figure: Figure, axes: Axes, marks: Sequence[tuple[Point, str, float]]
) -> list[Annotation]:
    """Write each label at the nearest place where it covers no mark, error bar or other label."""
    figure.draw_without_rendering()  # settles where everything is
    figure.set_layout_engine("none")
    pixels = figure.dpi / 72  # of one typographic point
    inside = axes.get_window_extent()
    taken = []
    for point, _, size in marks:
        x, low = axes.transData.transform((point.x, point.low))
        _, high = axes.transData.transform((point.x, point.high))
        _, middle = axes.transData.transform((point.x, point.y))
        half = size * pixels / 2
        taken.append(Bbox([[x - half, middle - half], [x + half, middle + half]]))
        if point.high > point.low:
            taken.append(Bbox([[x - 3, low], [x + 3, high]]))
    written = []
    for point, colour, _ in marks:
        text = axes.annotate(
            point.label,
            (point.x, point.y),
            xytext=OFFSETS[0],
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=LABEL_SIZE,
            color=colour,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.6,
                "shrinkA": 0,
                "shrinkB": 3,
            },
        )
        _settle(text, taken, inside, pixels)
        written.append(text)
    return written


def _settle(text: Annotation, taken: list[Bbox], inside: Bbox, pixels: float) -> None:
    """Move one label to the first place that is free, or where it covers least."""
    canvas = text.get_figure(root=True).canvas
    assert isinstance(canvas, FigureCanvasAgg)
    text.arrow_patch.set_visible(False)
    width = text.get_window_extent(canvas.get_renderer()).width  # type: ignore[attr-defined]
    best, least = OFFSETS[0], np.inf
    for dx, dy in OFFSETS:
        # `dx` is the gap to the nearer edge, so that long labels start where short ones do.
        offset = (dx + np.sign(round(dx, 6)) * (width / pixels / 2 - 4), dy)
        text.set_position(offset)
        box = text.get_window_extent(canvas.get_renderer()).padded(CLEARANCE)
        covered = sum(_overlap(box, other) for other in taken)
        covered += box.width * box.height - _overlap(box, inside)
        if covered < least:
            best, least = offset, covered
        if covered <= 0.01:
            break
    text.set_position(best)
    text.arrow_patch.set_visible(bool(np.hypot(*best) > LEADER_FROM + width / pixels / 2))
    taken.append(text.get_window_extent(canvas.get_renderer()))


def _overlap(one: Bbox, other: Bbox) -> float:
    """Return the area two boxes share, in square pixels."""
    common = Bbox.intersection(one, other)
    return 0.0 if common is None else common.width * common.height


def svg(figure: Figure, title: str) -> str:
    """Return a figure as SVG, the same text for the same figure: no date, no random names."""
    text = io.StringIO()
    # Letters as outlines: the picture looks alike wherever it is shown.
    with matplotlib.rc_context({"svg.hashsalt": "blocksparse", "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    return text.getvalue()
