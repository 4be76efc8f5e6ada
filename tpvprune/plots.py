"""Pictures of results as SVG. The only file that imports matplotlib, which the `report` extra installs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from io import BytesIO
from typing import Any

from tpvprune.curves import SensitivityCurves
from tpvprune.errors import InputError

ROW, WIDTH = 0.22, 9.0  # inches
PAGE_WIDTH = 4.9  # inches: a phone's width, so that a page need not shrink its figures' letters
# Colours that stand for those of the page a figure is put into.
INK, SOFT, KEPT, GONE, OTHER = "#010203", "#010204", "#010205", "#010206", "#010207"
_LIGHT = {"--ink": "#1b1f24", "--soft": "#59636e", "--kept": "#0a62c4", "--gone": "#b3bcc6", "--other": "#a4480a"}
_OF_PAGE = {INK: "--ink", SOFT: "--soft", KEPT: "--kept", GONE: "--gone", OTHER: "--other"}


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def check() -> None:
    """Refuse to begin what cannot be drawn in the end.

    Raises:
        InputError: matplotlib is not installed.
    """
    if not available():
        raise InputError("drawing needs matplotlib; python -m pip install 'tpvprune[report]', or leave --plot out")


def draw(curves: SensitivityCurves, at: float | None = None) -> bytes:
    """One row a group, most robust first: KL in nats at each share, predicted (dots) and measured (rings).

    Args:
        curves: from `sensitivity`.
        at: the share that groups are ranked at; the usual one if left out.

    Returns:
        The SVG file's contents.

    Raises:
        InputError: matplotlib is not installed.
    """
    check()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ranked = curves.ranked(at)
    with rc_context({"svg.hashsalt": "tpvprune", "svg.fonttype": "none"}):  # the same curves give the same file
        figure = Figure(figsize=(WIDTH, 1.6 + ROW * len(ranked)), layout="constrained")
        axes = figure.add_subplot()
        series = [(f"keep {share:g}", share) for share in curves.shares]
        if any(curve.kind == "block" for curve in ranked):
            series.append(("block gone", 0.0))
        for number, (name, share) in enumerate(series):
            points = [curve.at(share) if (curve.kind == "block") == (share == 0) else None for curve in ranked]
            for label, values, face in (
                (name, [None if p is None else p.predicted_kl for p in points], f"C{number}"),
                (f"{name}, measured", [None if p is None else p.measured_kl for p in points], "none"),
            ):
                # A logarithm has no place for a group that loses nothing.
                known = [(value, row) for row, value in enumerate(values) if value is not None and value > 0]
                if known:
                    x, y = zip(*known, strict=True)
                    axes.scatter(x, y, s=24, facecolors=face, edgecolors=f"C{number}", label=label)
        axes.set_xscale("log")
        axes.set_yticks(range(len(ranked)), [curve.group for curve in ranked], fontsize=8)
        axes.set_ylim(len(ranked) - 0.5, -0.5)
        axes.set_xlabel("KL from the dense model in nats, one group alone cut")
        axes.set_title(f"most robust for its multiply-adds first, at {at if at is not None else curves.usual_share:g}")
        axes.grid(axis="both", alpha=0.3)
        figure.legend(loc="outside lower center", ncols=len(series), fontsize=8)
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def bars(rows: Sequence[tuple[str, int, int]], unit: str, name: str) -> str:
    """One row each: how much there was, and how much of it is left.

    Args:
        rows: what it is called, before, now.
        unit: of the numbers.
        name: of the figure, in its page.
    """
    figure, axes = _blank(0.55 + ROW * len(rows))
    places = range(len(rows))
    axes.barh(places, [before for _, before, _ in rows], color=GONE, height=0.7)
    axes.barh(places, [now for *_, now in rows], color=KEPT, height=0.7)
    axes.set_yticks(places, [_short(label) for label, *_ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(_engineering())
    axes.set_xlabel(unit)
    return _inline(figure, name, f"{unit}, before and now, of {len(rows)} rows")


def levels(rows: Sequence[tuple[str, float]], unit: str, name: str) -> str:
    """One bar each, with its value; predictions in another colour than what was measured."""
    figure, axes = _blank(0.6 + 0.32 * len(rows))
    places = range(len(rows))
    colours = [OTHER if label.startswith("predicted") else KEPT for label, _ in rows]
    axes.barh(places, [value for _, value in rows], color=colours, height=0.6)
    axes.set_yticks(places, [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    top = max(value for _, value in rows)
    axes.set_xlim(0, top * 1.2 if top > 0 else 1)
    for place, (_, value) in enumerate(rows):
        axes.annotate(f" {value:.3g}", (value, place), va="center", color=INK, fontsize=9)
    axes.set_xlabel(unit)
    return _inline(figure, name, "; ".join(f"{label} {value:.3g}" for label, value in rows))


def histogram(kept: Sequence[float], gone: Sequence[float], unit: str, name: str, bins: int = 30) -> str:
    """How many units have which score; a logarithm has no place for those of nothing, which are counted in words."""
    logs = [[math.log10(value) for value in values if value > 0] for values in (kept, gone)]
    nothing = len(kept) + len(gone) - sum(map(len, logs))
    figure, axes = _blank(2.6)
    if any(logs):
        axes.hist(logs, bins=bins, stacked=True, color=[KEPT, GONE], label=["stay", "leave"])
        axes.xaxis.set_major_formatter(lambda at, _: f"{10**at:.1g}")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, labelcolor=INK)
    axes.set_ylabel("units")
    axes.set_xlabel(unit + (f" ({nothing:,} of nothing are not drawn)" if nothing else ""))
    return _inline(figure, name, f"distribution of scores: {len(kept):,} units stay, {len(gone):,} leave")


def lines(curves: Sequence[tuple[str, Sequence[tuple[float, float]]]], across: str, up: str, name: str) -> str:
    """One line each over the same axis, which runs from much to little.

    Args:
        curves: what each is called, and its points.
        across: what lies along the axis.
        up: what stands on it.
        name: of the figure, in its page.
    """
    rows = -(-len(curves) // 3)
    figure, axes = _blank(2.8 + 0.2 * rows)
    colours, dashes, marks = (KEPT, OTHER, INK, SOFT), ("-", "--", ":"), "osD^v"
    for number, (label, points) in enumerate(curves):
        colour, dash = colours[number % 4], dashes[number // 4 % 3]
        axes.plot(*zip(*points, strict=True), dash, color=colour, marker=marks[number % 5], markersize=4, label=label)
    axes.invert_xaxis()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    figure.legend(loc="outside lower left", ncols=3, frameon=False, labelcolor=INK, fontsize=9)
    return _inline(figure, name, f"{up} over {across}: {', '.join(label for label, _ in curves)}")


def standalone(svg: str) -> str:
    """A page's figure as a file of its own, in the page's light colours."""
    for variable, colour in _LIGHT.items():
        svg = svg.replace(f"var({variable})", colour)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return svg.replace("<svg ", f"<svg {spaces} ", 1)


def _blank(height: float) -> tuple[Any, Any]:
    """A figure and its axes, in the colours of the page."""
    check()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PAGE_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(SOFT)
    axes.tick_params(colors=SOFT, labelcolor=INK, labelsize=9)
    axes.xaxis.label.set_color(SOFT)
    axes.yaxis.label.set_color(SOFT)
    return figure, axes


def _engineering() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _short(name: str, most: int = 26) -> str:
    """A layer's name, its middle left out where it is long."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


def _inline(figure: Any, name: str, told: str) -> str:
    """The figure as an SVG element to put into a page: its colours, its letters, as wide as there is room."""
    from matplotlib import rc_context

    buffer = BytesIO()
    with rc_context({"svg.hashsalt": f"tpvprune {name}", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    for pattern in (r"<metadata>.*?</metadata>", r"<style[^>]*>.*?</style>", r"<!--.*?-->"):
        svg = re.sub(pattern, "", svg, flags=re.DOTALL)
    used = set(re.findall(r"""(?:url\(|href=")#([^)"]+)""", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"""(url\(|href="| id=")(#?)([^)"]+)""", lambda f: f"{f[1]}{f[2]}{_prefixed(f, name)}", svg)
    for colour, variable in _OF_PAGE.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", svg)
    head = re.match(r"<svg[^>]*>", svg)
    assert head is not None
    box = re.search(r'viewBox="[^"]*"', head[0])
    assert box is not None
    return f'<svg {box[0]} role="img" aria-label="{escape(told)}">{svg[head.end() :].strip()}'


def _prefixed(found: re.Match[str], name: str) -> str:
    """Ids of one page may not meet; links to elsewhere stay what they are."""
    local = found[2] == "#" or found[1] == ' id="'
    return f"{name}-{found[3]}" if local else found[3]
