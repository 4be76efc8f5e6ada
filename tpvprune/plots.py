"""Pictures of results as SVG. The only file that imports matplotlib, which the `report` extra installs."""

from __future__ import annotations

from importlib.util import find_spec
from io import BytesIO

from tpvprune.curves import SensitivityCurves
from tpvprune.errors import InputError

ROW, WIDTH = 0.22, 9.0  # inches


def check() -> None:
    """Refuse to begin what cannot be drawn in the end.

    Raises:
        InputError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
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
