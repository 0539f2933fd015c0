"""Draws throughput and latency over the number of replicas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loadtest.scaling import Measurement


def draw(measurements: Sequence[Measurement], file: Path) -> None:
    """Write the plot as a PNG of some tens of kB."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    throughput, latency = figure.subplots(1, 2)
    for shape in dict.fromkeys(measurement.shape for measurement in measurements):
        rows = [measurement for measurement in measurements if measurement.shape == shape]
        replicas = [row.replicas for row in rows]
        throughput.plot(replicas, [row.items_per_s for row in rows], marker="o", label=shape)
        latency.plot(replicas, [1000 * row.p99_s for row in rows], marker="o", label=shape)
    ideal = {row.replicas: row.ideal_items_per_s for row in measurements}
    throughput.plot(list(ideal), list(ideal.values()), color="gray", linestyle="--", label="forward passes alone")
    for axes, title, unit in ((throughput, "Throughput", "items/s"), (latency, "Latency of a request", "p99, ms")):
        axes.set(title=title, xlabel="replicas", ylabel=unit, xscale="log")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_xticks(list(ideal), [str(replicas) for replicas in ideal])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    throughput.legend(fontsize="small")
    figure.savefig(file, dpi=110, metadata={"Software": None})
