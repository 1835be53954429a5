"""The plots of `common.report`: losses over steps and over time, memory and throughput, scaling."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from common.metrics import Run
from common.tables import gib, shown

MOST_POINTS = 150  # per curve
# Where the four shades of a technique begin in matplotlib's colormap tab20c.
SHADES = {"zero": 0, "offload": 4, "pipeline": 8, "baseline": 16}
OTHER_SHADES = 12
MARKERS = "osD^v<>p"
STYLE: dict[Any, Any] = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.titlelocation": "left",
    "axes.titlesize": "medium", "figure.titlesize": "large", "figure.titleweight": "bold", "grid.color": "0.9",
    "legend.frameon": False, "text.parse_math": False,
}  # fmt: skip


def draw(runs: list[Run]) -> dict[str, Figure | str]:
    """Returns {file name: the plot, or why there is none}."""
    with matplotlib.rc_context(STYLE):
        return {
            "losses.png": loss_by_step(runs) or "no run has a step with a loss",
            "memory_and_throughput.png": bars(runs) or "no run has a step",
            "loss_by_time.png": loss_by_time(runs) or "no run has a step with a loss",
            "scaling.png": scaling(runs) or "no technique ran the same model on two numbers of GPUs",
        }


def looks(run: Run, runs: list[Run]) -> dict[str, Any]:
    """Returns the color, a shade per technique and stage, and the marker of a run."""
    names = sorted({other.name for other in runs if other.technique == run.technique})
    shade = SHADES.get(run.technique, OTHER_SHADES) + names.index(run.name) % 4
    color = matplotlib.colormaps["tab20c"](shade)
    return {"color": color, "marker": MARKERS[runs.index(run) % len(MARKERS)]}


def new_figure(title: str, height: float = 4.8, panels: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """Returns a figure 1,200 pixels wide and its axes."""
    figure = Figure(figsize=(8, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def loss_by_step(runs: list[Run]) -> Figure | None:
    return curves(runs, "Loss by step", "optimizer step", lambda record: record["step"])


def loss_by_time(runs: list[Run]) -> Figure | None:
    longest = max((step["elapsed"] for run in runs for step in run.steps), default=0)
    units = {"hours": 3600, "minutes": 60, "seconds": 1}
    unit = next((unit for unit, seconds in units.items() if longest > 3 * seconds), "seconds")
    return curves(runs, "Loss by wall time", f"{unit} since the start", lambda record: record["elapsed"] / units[unit])


def curves(runs: list[Run], title: str, x_label: str, x_of: Callable[[dict[str, Any]], float]) -> Figure | None:
    """Plots the losses, one line per run, with a hollow marker for each evaluation.

    Each point of a long run is the mean of several steps. Markers are staggered, so that those of runs with equal
    losses do not hide each other.
    """
    drawn = [run for run in runs if any("loss" in step for step in run.steps)]
    if not drawn:
        return None
    figure, (axes,) = new_figure(title)
    filled: dict[str, Any] = {"linestyle": "none", "markersize": 8, "markeredgecolor": "white", "zorder": 3}
    hollow: dict[str, Any] = filled | {
        "markeredgecolor": None,
        "markerfacecolor": "white",
        "markeredgewidth": 1.6,
        "zorder": 4,
    }
    window = max(1, max(len(run.steps) for run in drawn) // MOST_POINTS)
    for number, run in enumerate(drawn):
        groups = [run.steps[start : start + window] for start in range(0, len(run.steps), window)]
        every = max(1, len(groups) // 6)
        x = [x_of(group[-1]) for group in groups]
        losses = [statistics.fmean(step.get("loss", float("nan")) for step in group) for group in groups]
        style = looks(run, runs)
        axes.plot(x, losses, color=style["color"])
        some = slice(number * every // len(drawn), None, every)
        axes.plot(x[some], losses[some], label=run.label, **style, **filled)
        evals = [record for record in run.evals if record["phase"] != "test" and "loss" in record]
        axes.plot([*map(x_of, evals)], [record["loss"] for record in evals], **style, **hollow)
    axes.plot([], [], color="0.4", marker="o", label="held-out text", **hollow)
    figure.legend(loc="outside right upper")
    axes.set(xlabel=x_label, ylabel="loss (nats per token)" + (f", mean of {window:,} steps" if window > 1 else ""))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.grid(axis="y")
    return figure


def bars(runs: list[Run]) -> Figure | None:
    """Plots peak memory and tokens per second, one bar per run."""
    panels = {
        "peak GPU memory (GiB)": [run.peak("gpu_peak_gib") for run in runs],
        "peak host memory (GiB)": [run.peak("host_peak_gib") for run in runs],
        "tokens/s, all ranks": [run.median("tokens_per_second") for run in runs],
    }
    panels = {title: values for title, values in panels.items() if any(values)}
    if not panels:
        return None
    figure, all_axes = new_figure("Memory and throughput", 1.3 + 0.36 * len(runs), len(panels))
    colors = [looks(run, runs)["color"] for run in runs]
    for axes, (title, values) in zip(all_axes, panels.items(), strict=True):
        drawn = axes.barh(range(len(runs)), [value or 0 for value in values], height=0.7, color=colors)
        texts = [gib(value) if "GiB" in title else shown(value, "{:,.0f}") for value in values]
        axes.bar_label(drawn, texts, padding=3)
        axes.set(title=title, xticks=[], yticks=[])
        axes.tick_params(left=False)
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.spines["bottom"].set_visible(False)
    several = len({run.gpus for run in runs}) > 1
    names = [f"{run.label}, {run.gpus_in_words}" if several else run.label for run in runs]
    all_axes[0].set_yticks(range(len(runs)), names)
    return figure


def scaling(runs: list[Run]) -> Figure | None:
    """Plots tokens per second over the number of GPUs, next to a speed in proportion to the fewest GPUs."""
    groups: dict[tuple, dict[int, tuple[float, Run]]] = defaultdict(dict)
    for run in runs:
        rate = run.median("tokens_per_second")
        if rate:
            name = run.technique if run.technique == "pipeline" else run.name
            groups[name, run.start.get("model"), bool(run.gpu)].setdefault(run.gpus, (rate, run))
    groups = {key: points for key, points in groups.items() if len(points) > 1}
    if not groups:
        return None
    figure, (axes,) = new_figure("Scaling")
    several_models = len({model for _, model, _ in groups}) > 1
    for (name, model, _), points in groups.items():
        gpus = sorted(points)
        rates = [points[count][0] for count in gpus]
        ideal = [rates[0] / gpus[0] * count for count in gpus]
        style = looks(points[gpus[-1]][1], runs)
        name = f"{name}, {model}" if several_models else name
        axes.plot(gpus, rates, label=f"{name}: {rates[-1] / ideal[-1]:.0%} on {gpus[-1]}", **style)
        axes.plot(gpus, ideal, linestyle=":", color=style["color"])
    axes.set(
        title="dotted: in proportion to the fewest GPUs; the legend says how much of that is reached",
        xlabel="GPUs" if all(on_gpu for _, _, on_gpu in groups) else "GPUs, on a CPU ranks",
        ylabel="tokens/s, all ranks", xlim=(0, None), ylim=(0, None),
    )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y")
    axes.legend(loc="upper left")
    return figure
