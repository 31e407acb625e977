"""The loss curve as a PNG: inline in Dagster's materialization and as an artifact in MLflow."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

Curves = Mapping[str, Sequence[tuple[int, float]]]


def curve_png(curves: Curves, title: str, names: Sequence[str] = ("loss",), *, dpi: int = 72) -> bytes | None:
    """One panel per named metric that was logged, x = optimiser step; None if none was."""
    shown = [n for n in names if curves.get(n)]
    if not shown:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(shown), 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    for i, name in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), i + 1)
        steps, values = zip(*curves[name], strict=True)
        axes.plot(steps, values, color="#3b6fb6", linewidth=1.4, marker="." if len(steps) < 40 else None)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
