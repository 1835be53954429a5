"""Compares runs: a table and plots from the `metrics.jsonl` that every training script writes.

    python -m common.report runs/zero runs/offload runs/pipeline --output_dir runs/report
    python -m common.report --run-all --output_dir runs/report

The second line trains first: the baseline, ZeRO 1 to 3, offload 1 to 3 and the pipeline, one after the other, on one
model and one text (`common.run_all`). Flags behind `--` go to every script.

How a file is read: a `run` event that does not resume a checkpoint begins anew, so of several runs in one directory
the last one counts. A resumed run goes on with the curve: from its first step on it replaces what was there. A line
that cannot be used is named and skipped.
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import StrMethodFormatter

from common.cli import ArgumentParser
from common.errors import UserError, directory_name, one_line

WARM_UP = 3  # steps after each start that do not count for speed
MOST_POINTS = 150  # of a curve
MOST_NAMES = 40  # in a legend
SAME_LOSS = 1e-4  # losses that differ less are equal within float32's rounding
NO_VALUE = "–"

# What is read of each event: what it must be, and whether it must be there.
NUMBER, COUNT, POSITIVE, TEXT, OBJECT = (
    "a finite number", "a whole number", "a whole number above 0", "a line of text", "an object",
)  # fmt: skip
KINDS = {  # no number from 1e300 on, since a product or a mean of such would be infinite
    NUMBER: lambda value: type(value) in (int, float) and -1e300 < value < 1e300,
    COUNT: lambda value: type(value) is int and 0 <= value < 1e300,
    POSITIVE: lambda value: type(value) is int and 0 < value < 1e300,
    TEXT: lambda value: isinstance(value, str) and value.isprintable(),
    OBJECT: lambda value: isinstance(value, dict),
}
FIELDS = {
    "run": {
        "technique": (TEXT, True), "world_size": (POSITIVE, True), "parameters": (COUNT, False),
        "model": (TEXT, False), "dataset": (TEXT, False), "args": (OBJECT, False), "ds_config": (OBJECT, False),
        "hardware": (OBJECT, False),
    },
    "step": {
        "step": (POSITIVE, True), "loss": (NUMBER, False), "tokens": (COUNT, False), "step_time_s": (NUMBER, False),
        "tokens_per_second": (NUMBER, False), "tokens_per_second_per_gpu": (NUMBER, False), "mfu": (NUMBER, False),
        "gpu_peak_gib": (NUMBER, False), "host_peak_gib": (NUMBER, False), "samples_seen": (COUNT, False),
    },
    "eval": {
        "step": (COUNT, True), "phase": (TEXT, True), "loss": (NUMBER, False), "perplexity": (NUMBER, False),
    },
    "summary": {},
}  # fmt: skip

# Okabe and Ito's colours, which colour-blind readers can tell apart.
ACCENTS = {"baseline": "#000000", "zero": "#0072B2", "offload": "#D55E00", "pipeline": "#009E73"}
OTHER_ACCENT = "#CC79A7"
MARKERS = "osD^vP*X"
STYLE = {
    "font.size": 10, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.titlepad": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.edgecolor": "0.4", "grid.color": "0.9", "legend.frameon": False, "savefig.dpi": 150,
    "text.parse_math": False,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- reading


def read_run(directory: str | Path, warn: Callable[[str], None]) -> "Run":
    """The run in a directory.

    Args:
        warn: called with one line for each line of the file that is skipped.

    Raises:
        UserError: there is no run in it.
    """
    directory = Path(directory)
    path = directory / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        inside = sorted(str(found.parent) for found in directory.glob("*/metrics.jsonl"))
        hint = f"; name the runs inside it instead: {' '.join(inside)}" if inside else ""
        raise UserError(f"{directory} holds no run: {path.name} cannot be read ({error.strerror}){hint}") from error
    run = None
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line:
            break  # what follows the last line's end
        try:
            record = parse(line)
            if record["event"] == "run" and (run is None or not resumes(record)):
                run = Run(directory)
            if run is None:
                raise ValueError("it comes before any run event")
        except ValueError as error:
            warn(f"{path} line {number}: skipped ({one_line(error, 200)})")
            continue
        run.add(record)
    if run is None:
        raise UserError(f"{directory} holds no run: {path.name} has no run event")
    return run


def parse(line: bytes) -> dict[str, Any]:
    """One line of a `metrics.jsonl` as a record whose fields are what they should be.

    Raises:
        ValueError: it is not.
    """

    def no_constant(name):
        raise ValueError(f"{name} is not JSON")

    try:
        record = json.loads(line.decode("utf-8"), parse_constant=no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise ValueError("not JSON: nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError("not an object")
    event = record.get("event")
    if not isinstance(event, str) or event not in FIELDS:
        raise ValueError(f"event is {shown(event)}, expected one of {', '.join(FIELDS)}")
    for name, (kind, needed) in {"time": (NUMBER, True), **FIELDS[event]}.items():
        value = record.get(name)
        if (needed or value is not None) and not KINDS[kind](value):
            raise ValueError(f"{name} of a {event} event is {shown(value)}, expected {kind}")
    return record


def shown(value: Any) -> str:
    return "missing" if value is None else one_line(json.dumps(value), 40)


def resumes(start: dict[str, Any]) -> bool:
    """Whether that `run` event goes on from a checkpoint."""
    return inner(start, "args", "resume_from_checkpoint") is not None


def inner(record: Any, *keys: str) -> Any:
    """`record[key][key]…`, or None where something on the way is missing or no object."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


class Run:
    """One run, put together from the records of its file.

    Attributes:
        directory: as it was given.
        name: technique and stage, such as "zero 2".
        extras: what tells this run from others of its name (see `tell_apart`).
        label: the name, with these.
        start: the newest `run` event.
        steps, evals: `step` and `eval` events in order, each with `elapsed`: seconds since the run began, the time
            between a stop and the resumed run's start left out.
        finished: whether the run came to its end.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.start, self.extras = None, []
        self.steps, self.evals, self.finished = [], [], False
        self._steps_since_start, self._elapsed_before = 0, 0.0

    def add(self, record: dict[str, Any]) -> None:
        """Takes the file's next record."""
        if record["event"] == "run":
            self.start, self.finished, self._steps_since_start = record, False, 0
        elif record["event"] == "summary":
            self.finished = True
        elif record["event"] == "eval":
            self.evals.append(self._timed(record))
        else:
            for records in (self.steps, self.evals):
                while records and records[-1]["step"] >= record["step"]:
                    records.pop()
            if self._steps_since_start == 0:
                self._elapsed_before = self.steps[-1]["elapsed"] if self.steps else 0.0
            self._steps_since_start += 1
            warm_up = self._steps_since_start <= WARM_UP
            previous = self.steps[-1] if self.steps else {"step": 0, "samples_seen": 0}
            samples = None
            if record["step"] == previous["step"] + 1 and None not in (
                record.get("samples_seen"), previous.get("samples_seen"),
            ):  # fmt: skip
                samples = record["samples_seen"] - previous["samples_seen"]
            self.steps.append(self._timed(record) | {"warm_up": warm_up, "samples": samples})

    def _timed(self, record):
        return record | {"elapsed": self._elapsed_before + record["time"] - self.start["time"]}

    # What the table and the plots show is None where the file does not say.

    @property
    def technique(self) -> str:
        return self.start["technique"]

    @property
    def gpus(self) -> int:
        """How many ranks, each of which has a GPU of its own where there are any."""
        return self.start["world_size"]

    @property
    def on_gpu(self) -> bool:
        return self.peak("gpu_peak_gib") is not None or inner(self.start, "hardware", "gpu") is not None

    @property
    def gpus_in_words(self) -> str:
        return f"{self.gpus} {'GPU' if self.on_gpu else 'rank'}{'s' if self.gpus > 1 else ''}"

    @property
    def stage(self) -> int | None:
        """The ZeRO stage."""
        stage = inner(self.start, "ds_config", "zero_optimization", "stage")
        return stage if KINDS[COUNT](stage) else None

    @property
    def split(self) -> str:
        """The technique, for a pipeline with its number of stages."""
        if self.technique != "pipeline":
            return self.technique
        stages = inner(self.start, "args", "num_stages")
        return f"pipeline × {stages if KINDS[POSITIVE](stages) else self.gpus}"

    @property
    def name(self) -> str:
        return self.split if self.technique == "pipeline" or self.stage is None else f"{self.technique} {self.stage}"

    @property
    def label(self) -> str:
        return f"{self.name}{self._in_brackets}"

    @property
    def in_table(self) -> str:
        """What stands in the table's first column, beside a column for the stage."""
        return f"{self.split}{self._in_brackets}{'' if self.finished else ', unfinished'}"

    @property
    def _in_brackets(self):
        return f" ({', '.join(self.extras)})" if self.extras else ""

    @property
    def offload(self) -> str:
        places = {"optimizer": "offload_optimizer", "parameters": "offload_param"}
        devices = {what: inner(self.start, "ds_config", "zero_optimization", key, "device")
                   for what, key in places.items()}  # fmt: skip
        return " + ".join(what for what, device in devices.items() if device not in (None, "none")) or "none"

    @property
    def train_loss(self) -> float | None:
        return self.steps[-1].get("loss") if self.steps else None

    def evaluation(self, *phases: str) -> dict[str, Any]:
        """The newest evaluation of those phases, or {}."""
        return next((record for record in reversed(self.evals) if record["phase"] in phases), {})

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The steps that count for speed: without the first few after each start, where there are others."""
        return [step for step in self.steps if not step["warm_up"]] or self.steps[1:] or self.steps

    def median(self, field: str) -> float | None:
        values = [step[field] for step in self.measured if step.get(field) is not None]
        return statistics.median(values) if values else None

    @property
    def samples_per_second(self) -> float | None:
        counted = [step for step in self.measured if step["samples"] is not None and step.get("step_time_s")]
        seconds = sum(step["step_time_s"] for step in counted)
        return sum(step["samples"] for step in counted) / seconds if seconds > 0 else None

    def peak(self, field: str) -> float | None:
        return max((step[field] for step in self.steps if step.get(field) is not None), default=None)


def tell_apart(runs: list[Run]) -> None:
    """Gives each run a label of its own: its name; among equal ones its GPUs or directory too."""
    for run in runs:
        run.extras = []
    for extra in (
        lambda run: run.gpus_in_words,
        lambda run: run.directory.resolve().name,
        lambda run: str(run.directory),
    ):
        alike = defaultdict(list)
        for run in runs:
            alike[run.label].append(run)
        for group in alike.values():
            if len({extra(run) for run in group}) > 1:
                for run in group:
                    run.extras.append(extra(run))


# --------------------------------------------------------------------------------------------------- comparing


def baseline_of(run: Run, runs: list[Run]) -> Run | None:
    """The baseline to compare with: if there are several, of the same model, hardware and number of GPUs."""
    baselines = [other for other in runs if other.technique == "baseline"]

    def likeness(other):
        return other is run, same_model(other, run), other.on_gpu == run.on_gpu, other.gpus == run.gpus

    return max(baselines, key=likeness, default=None)


def same_model(one: Run, other: Run) -> bool:
    return all(one.start.get(field) == other.start.get(field) for field in ("model", "parameters"))


def memory_field(runs: list[Run]) -> str | None:
    """What to compare the memory of those runs by, or None if some have GPUs and some do not."""
    on_gpu = {run.on_gpu for run in runs}
    if len(on_gpu) > 1:
        return None
    return "gpu_peak_gib" if on_gpu == {True} else "host_peak_gib"


def relative_speed(run: Run, baseline: Run | None) -> float | None:
    return ratio(run.median("tokens_per_second"), baseline.median("tokens_per_second")) if baseline else None


def relative_memory(run: Run, baseline: Run | None) -> float | None:
    field = memory_field([run, baseline]) if baseline else None
    return ratio(run.peak(field), baseline.peak(field)) if field else None


def ratio(value: float | None, of: float | None) -> float | None:
    return value / of if value is not None and of else None


def agreement(runs: list[Run]) -> tuple[list[Run], Run, float, Run, int] | None:
    """How far the losses of the runs that saw the same tokens at every step are apart.

    Returns:
        (those runs, the one that the others are compared with, the largest difference, whose it is, at which step), or
        None where there are not two such runs.
    """

    def course(run):
        return [(step["step"], step.get("tokens"), step.get("loss") is not None) for step in run.steps]

    reference = baseline_of(runs[0], runs) or runs[0]
    alike = [run for run in runs if same_model(run, reference) and course(run) == course(reference)]
    if len(alike) < 2 or not reference.steps or not all(tokens and loss for _, tokens, loss in course(reference)):
        return None
    differences = (
        (abs(step["loss"] - other["loss"]), run, step["step"])
        for run in alike
        for step, other in zip(run.steps, reference.steps, strict=True)
    )
    return alike, reference, *max(differences, key=lambda difference: difference[0])


def on_agreement(alike: list[Run], reference: Run, largest: float, run: Run, step: int) -> str:
    """The same in a sentence or two."""
    who = ", ".join(run.label for run in alike)
    if not largest:
        return f"{who}: the same model, tokens and loss at each of {len(reference.steps):,} steps."
    where = f"from {reference.label} is {largest:.1e} ({run.label}, step {step:,})"
    if largest > SAME_LOSS:
        return f"{who}: the same model and tokens at every step, but other losses; the largest difference {where}."
    return (
        f"{who}: the same model, the same tokens and, within {SAME_LOSS:g}, the same loss at each of "
        f"{len(reference.steps):,} steps; the largest difference {where}."
    )


# ----------------------------------------------------------------------------------------------------- table


def formatted(value: float | None, form: str) -> str:
    return NO_VALUE if value is None else form.format(value)


def gib(value: float | None) -> str:
    return formatted(value, "{:.2f}" if value is not None and value < 10 else "{:,.1f}")


# Heading, and what it shows of a run and its baseline.
COLUMNS = {
    "technique": lambda run, _: run.in_table,
    "stage": lambda run, _: formatted(run.stage, "{}"),
    "offload": lambda run, _: run.offload,
    "GPUs": lambda run, _: str(run.gpus) if run.on_gpu else f"{run.gpus} (CPU)",
    "parameters": lambda run, _: formatted(run.start.get("parameters"), "{:,}"),
    "train loss": lambda run, _: formatted(run.train_loss, "{:.4f}"),
    "eval before": lambda run, _: formatted(run.evaluation("before").get("loss"), "{:.4f}"),
    "eval after": lambda run, _: formatted(run.evaluation("after", "epoch").get("loss"), "{:.4f}"),
    "perplexity": lambda run, _: formatted(run.evaluation("after", "epoch").get("perplexity"), "{:,.2f}"),
    "tok/s/GPU": lambda run, _: formatted(run.median("tokens_per_second_per_gpu"), "{:,.0f}"),
    "MFU": lambda run, _: formatted(run.median("mfu"), "{:.1%}").replace("%", " %"),
    "samples/s": lambda run, _: formatted(run.samples_per_second, "{:,.1f}"),
    "GPU GiB": lambda run, _: gib(run.peak("gpu_peak_gib")),
    "host GiB": lambda run, _: gib(run.peak("host_peak_gib")),
    "speed": lambda run, baseline: formatted(relative_speed(run, baseline), "{:.2f} ×"),
    "memory": lambda run, baseline: formatted(relative_memory(run, baseline), "{:.2f} ×"),
}
LEFT_ALIGNED = ("technique", "offload")


def table(runs: list[Run]) -> str:
    """The Markdown table, a run a row, in columns that line up as plain text too."""
    rows = [[show(run, baseline_of(run, runs)).replace("|", "\\|") for show in COLUMNS.values()] for run in runs]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    left = [heading in LEFT_ALIGNED for heading in COLUMNS]

    def line(cells):
        padded = (
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(cells, widths, left, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join(
        "-" * (width + 2) if is_left else "-" * (width + 1) + ":" for width, is_left in zip(widths, left, strict=True)
    )
    return "\n".join([line(COLUMNS), f"|{rule}|", *map(line, rows)])


def caption(runs: list[Run]) -> list[str]:
    """What the columns mean, and what a reader of these very runs must know: sentences."""
    sentences = [
        "Train loss is the last step's, eval loss and perplexity those on held-out text.",
        f"Tokens a second and MFU are medians over the steps, samples a second documents over time; the first "
        f"{WARM_UP} steps after each start are left out.",
        "GPU GiB is the peak of the fullest GPU, host GiB that of all ranks of the first host together.",
    ]
    if any(run.technique == "baseline" for run in runs):
        sentences.append(
            "Speed is tokens a second of all GPUs together over the baseline's, memory the peak GPU GiB over the "
            "baseline's, on a CPU host GiB."
        )
    if not all(run.on_gpu for run in runs):
        sentences.append("On a CPU a rank counts as a GPU, ranks share the cores, and each loads the libraries anew.")
    for run in runs:
        baseline = baseline_of(run, runs)
        if baseline and not same_model(run, baseline):
            sentences.append(f"{run.label} is compared with a baseline of another model, {baseline.label}.")
    texts = defaultdict(list)
    for run in runs:
        texts[run.start.get("dataset", NO_VALUE)].append(run.label)
    if len(texts) > 1:
        of_each = "; ".join(f"{text}: {', '.join(labels)}" for text, labels in texts.items())
        sentences.append(f"These runs trained on different texts, so their losses do not compare ({of_each}).")
    unfinished = [run.label for run in runs if not run.finished]
    if unfinished:
        sentences.append(f"Not finished: {', '.join(unfinished)}.")
    return sentences


# ----------------------------------------------------------------------------------------------------- plots


def assign_styles(runs: list[Run]) -> None:
    """Gives each run its technique's accent, in a shade for its stage, and a marker of its own within the technique."""
    of_technique = defaultdict(list)
    for run in runs:
        of_technique[run.technique].append(run)
    for technique, group in of_technique.items():
        accent = to_rgb(ACCENTS.get(technique, OTHER_ACCENT))
        names = sorted({run.name for run in group})
        for number, run in enumerate(group):
            place, count = (names.index(run.name), len(names)) if len(names) > 1 else (number, len(group))
            lightness = 0.5 * (1 - place / (count - 1)) if count > 1 else 0.0
            run.color = to_hex([part + (1 - part) * lightness for part in accent])
            run.marker = MARKERS[number % len(MARKERS)]


def wrap_label(label: str) -> str:
    """A name in lines narrow enough for a picture; of a very long one begin and end, the table has it in full."""
    lines = textwrap.wrap(label, 28)
    return "\n".join(lines if len(lines) <= 4 else [*lines[:2], "…", lines[-1]])


def lines_of(text: str) -> int:
    return 1 + text.count("\n")


def new_figure(title: str, height: float = 4.8, panels: int = 1) -> tuple[Figure, Iterable[Axes]]:
    """A figure 1,200 pixels wide and its axes."""
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure, axes


def loss_plot(runs: list[Run]) -> Figure | None:
    """The losses of all runs over the steps."""
    agreed = agreement(runs)
    if not agreed or agreed[2] > SAME_LOSS:
        return curves(runs, "Loss by step", "optimizer step", lambda record: record["step"])
    alike, _, largest, *_ = agreed
    # They lie on top of each other, so the line of each is narrower than those below it.
    widths = {run: 1.2 + 8 * (len(alike) - 1 - number) / (len(alike) - 1) for number, run in enumerate(alike)}
    figure = curves(runs, "Loss by step", "optimizer step", lambda record: record["step"], widths)
    within = f"within {largest:.1e}" if largest else "the same"
    figure.axes[0].set_title(
        f"{len(alike)} runs lie on top of each other:\ntheir losses are {within} at every step", fontsize=10,
        fontweight="normal",
    )  # fmt: skip
    return figure


def time_plot(runs: list[Run]) -> Figure | None:
    """The losses of all runs over wall time."""
    longest = max((step["elapsed"] for run in runs for step in run.steps), default=0)
    unit, seconds = next((unit for unit in (("hours", 3600), ("minutes", 60)) if longest > 3 * unit[1]), ("seconds", 1))
    return curves(
        runs, "Loss by wall time", f"{unit} since the run began to train", lambda record: record["elapsed"] / seconds
    )


def curves(
    runs: list[Run],
    title: str,
    x_label: str,
    x_of: Callable[[dict[str, Any]], float],
    widths: dict[Run, float] | None = None,
) -> Figure | None:
    """A line a run, with a few markers, and a hollow marker for each evaluation; None if no run has a loss.

    Of long runs each point is the mean of several steps, up to the one where it stands.
    Each run has its markers at steps of its own, so that those of equal runs do not hide each other.

    Args:
        x_of: a record's place on the axis.
        widths: of the runs' lines where not the usual one, {run: points}.
    """
    drawn = [run for run in runs if any(step.get("loss") is not None for step in run.steps)]
    if not drawn:
        return None
    # The legend stands beside the axes, since over wall time a line may run anywhere on them.
    named = drawn[:MOST_NAMES]
    names = [wrap_label(run.label) for run in named]
    figure, (axes,) = new_figure(title, max(4.8, 1 + 0.1 * len(names) + 0.17 * sum(map(lines_of, names))))
    window = max(1, max(len(run.steps) for run in drawn) // MOST_POINTS)
    handles = []
    for number, run in enumerate(drawn):
        points = [run.steps[max(0, end - window) : end] for end in range(len(run.steps), 0, -window)][::-1]
        x = [x_of(steps[-1]) for steps in points]
        losses = [mean(steps, "loss") for steps in points]
        axes.plot(x, losses, color=run.color, linewidth=(widths or {}).get(run, 1.6), zorder=2)
        every = max(1, len(losses) // 6)
        some = slice(min(number * every // len(drawn), len(losses) - 1), None, every)
        filled = {"marker": run.marker, "markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.8}
        axes.plot(x[some], losses[some], color=run.color, linestyle="none", zorder=3, **filled)
        evals = [record for record in run.evals if record["phase"] != "test" and record.get("loss") is not None]
        axes.plot(
            [x_of(record) for record in evals], [record["loss"] for record in evals], color=run.color, linestyle="none",
            marker=run.marker, markersize=9, markerfacecolor="white", markeredgewidth=1.6, zorder=4,
        )  # fmt: skip
        if number < len(names):
            handles.append(Line2D([], [], color=run.color, linewidth=2.4, label=names[number], **filled))
    if len(drawn) > len(named):
        handles.append(Line2D([], [], linestyle="none", label=f"and {len(drawn) - len(named):,} more"))
    hollow = {"marker": "o", "markersize": 9, "markerfacecolor": "white", "markeredgewidth": 1.6}
    handles.append(Line2D([], [], color="0.4", linestyle="none", label="on held-out text", **hollow))
    figure.legend(handles=handles, loc="outside right upper", labelspacing=0.6)
    axes.set(xlabel=x_label, ylabel="loss (nats a token)" + (f", mean of {window:,} steps" if window > 1 else ""))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.grid(axis="y")
    return figure


def mean(records: list[dict[str, Any]], field: str) -> float:
    values = [record[field] for record in records if record.get(field) is not None]
    return statistics.fmean(values) if values else float("nan")


def bar_plot(runs: list[Run]) -> Figure | None:
    """Peak memory and tokens a second, a bar a run."""
    panels = {
        "peak GPU memory (GiB)": lambda run: run.peak("gpu_peak_gib"),
        "peak host memory (GiB)": lambda run: run.peak("host_peak_gib"),
        "tokens/s, all ranks": lambda run: run.median("tokens_per_second"),
    }
    panels = {title: value for title, value in panels.items() if any(value(run) is not None for run in runs)}
    if not panels:
        return None
    # The bars are of all ranks together, so how many there are belongs to the names; some have it already.
    several = len({run.gpus for run in runs}) > 1
    names = [wrap_label(run.label) + (f", {run.gpus_in_words}" if several and not run.extras else "") for run in runs]
    height = 1.3 + sum(max(0.36, 0.18 * lines_of(name)) for name in names)
    figure, all_axes = new_figure("Memory and throughput", height, len(panels))
    for number, (axes, (title, value)) in enumerate(zip(all_axes, panels.items(), strict=True)):
        values = [value(run) for run in runs]
        bars = axes.barh(range(len(runs)), [v or 0 for v in values], color=[run.color for run in runs], height=0.7)
        form = gib if "GiB" in title else "{:,.0f}".format
        axes.bar_label(bars, [NO_VALUE if v is None else form(v) for v in values], padding=3, fontsize=9)
        axes.set_yticks(range(len(runs)), names if number == 0 else [])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(v or 0 for v in values) or 1)
        axes.set_title(title, fontsize=10, fontweight="normal")
        axes.set_xticks([])
        axes.tick_params(left=False)
        axes.spines["bottom"].set_visible(False)
    return figure


def scaling_plot(runs: list[Run]) -> Figure | None:
    """Tokens a second over the number of GPUs, beside what as many GPUs as fast as the first would make."""
    of_name = defaultdict(dict)
    for run in runs:
        rate = run.median("tokens_per_second")
        if rate:
            name = run.technique if run.technique == "pipeline" else run.name
            of_name[name, run.on_gpu, run.start.get("model")].setdefault(run.gpus, (rate, run))
    scaled = {key: points for key, points in of_name.items() if len(points) > 1}
    if not scaled:
        return None
    figure, (axes,) = new_figure("Scaling")
    counts = sorted({gpus for points in scaled.values() for gpus in points})
    several_models = len({model for _, _, model in scaled}) > 1
    ends = []
    for (name, _, model), points in scaled.items():
        gpus = sorted(points)
        rates = [points[count][0] for count in gpus]
        run = points[gpus[-1]][1]
        axes.plot(gpus, rates, color=run.color, marker=run.marker, linewidth=1.8, clip_on=False)
        ideal = [rates[0] / gpus[0] * count for count in gpus]
        axes.plot(gpus, ideal, color=run.color, linestyle=":", linewidth=1.2)
        text = f"{name}{f', {wrap_label(str(model))}' if several_models else ''}: {100 * rates[-1] / ideal[-1]:.0f} %"
        ends.append((gpus[-1], rates[-1], text, run.color))
    ticks = []
    for count in reversed(counts):  # those that have room; the most GPUs matter most
        if not ticks or ticks[-1] - count > 0.05 * counts[-1]:
            ticks.append(count)
    top = axes.get_ylim()[1]
    height = -top
    for x, y, text, color in sorted(ends, key=lambda end: end[1]):
        height = max(y, height + 0.06 * top)  # clear of the label below
        axes.annotate(text, (x, y), (1.03 * counts[-1], height), color=color, va="center", annotation_clip=False)
    axes.set(
        xlim=(0, counts[-1]), ylim=(0, top), xticks=ticks, ylabel="tokens/s, all ranks",
        xlabel="GPUs" if all(on_gpu for _, on_gpu, _ in scaled) else "GPUs, on a CPU ranks",
    )  # fmt: skip
    axes.set_title(
        "dotted: in proportion to the fewest GPUs; in per cent: how much of that the most reach", fontsize=10,
        fontweight="normal",
    )  # fmt: skip
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y")
    return figure


# File name, what it shows, and who draws it.
PLOTS = {
    "losses.png": ("Loss by step", loss_plot),
    "memory_and_throughput.png": ("Memory and throughput", bar_plot),
    "loss_by_time.png": ("Loss by wall time", time_plot),
    "scaling.png": ("Scaling", scaling_plot),
}
WITHOUT = {
    "losses.png": "no run has a step with a loss",
    "memory_and_throughput.png": "no run has a step",
    "loss_by_time.png": "no run has a step with a loss",
    "scaling.png": "no technique ran the same model on two numbers of GPUs",
}


# ---------------------------------------------------------------------------------------------------- report


def report(directories: Iterable[str | Path], output_dir: str | Path, warn: Callable[[str], None]) -> str:
    """Reads those runs and writes `report.md` and its plots; returns the table and what else is in words.

    Raises:
        UserError: a directory without a run, before anything is written; output_dir cannot be written.
    """
    runs, seen = [], set()
    for directory in directories:
        if Path(directory).resolve() in seen:
            warn(f"{directory}: named twice, shown once")
            continue
        seen.add(Path(directory).resolve())
        runs.append(read_run(directory, warn))
    for run in runs:
        if run.technique not in ACCENTS:
            warn(
                f"{run.directory}: technique {shown(run.technique)} is none of {', '.join(ACCENTS)}; shown all the same"
            )
    tell_apart(runs)
    assign_styles(runs)

    files, pictures, missing = {}, [], []
    with matplotlib.rc_context(STYLE):
        for name, (title, draw) in PLOTS.items():
            figure = draw(runs)
            if figure is None:
                missing.append(f"No {name}: {WITHOUT[name]}.")
                continue
            image = io.BytesIO()
            figure.savefig(image, format="png")
            files[name] = image.getvalue()
            pictures.append(f"![{title}]({name})")
    agreed = agreement(runs)
    findings = [table(runs), " ".join(caption(runs)), *([on_agreement(*agreed)] if agreed else []), *missing]
    paragraphs = ["# Training runs", *findings, *pictures, "\n".join(described(run) for run in runs)]
    files["report.md"] = ("\n\n".join(paragraphs) + "\n").encode()
    write(files, Path(output_dir))
    return "\n\n".join(findings)


def described(run: Run) -> str:
    seconds = max((record["elapsed"] for record in (*run.steps, *run.evals)), default=0)
    hardware = inner(run.start, "hardware", "gpu") or "CPU"
    return "- " + one_line(
        f"{run.label}: {run.start.get('model') or NO_VALUE} on {run.start.get('dataset') or NO_VALUE}, "
        f"{len(run.steps):,} steps in {seconds:,.0f} s, {run.gpus_in_words} ({hardware}), `{run.directory}`"
    )


def write(files: dict[str, bytes], directory: Path) -> None:
    """Writes the files of a report, {name: bytes}, all or none, and removes plots of an earlier one that it lacks."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in {*files, *PLOTS}:
            if (directory / name).is_dir():
                raise UserError(
                    f"--output_dir {directory}: its {name} is a directory, not the file to be written there"
                )
        with tempfile.TemporaryDirectory(dir=directory, prefix=".report-") as scratch:
            for name, content in files.items():
                Path(scratch, name).write_bytes(content)
            for name in files:
                os.replace(Path(scratch, name), directory / name)
        for name in PLOTS.keys() - files.keys():
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {directory} cannot be written: {error}") from error


# ------------------------------------------------------------------------------------------------------ command


def in_a_few_words(directory: Path) -> str:
    """A run's losses for a progress line, or nothing where it has none to show."""
    try:
        run = read_run(directory, warn=lambda line: None)
    except UserError:
        return "no run"
    before, after = (run.evaluation(*phases).get("loss") for phases in (("before",), ("after", "epoch")))
    return (
        f"train loss {formatted(run.train_loss, '{:.4f}')}, "
        f"on held-out text {formatted(before, '{:.4f}')} to {formatted(after, '{:.4f}')}"
    )


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = ArgumentParser(
        prog="python -m common.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("runs", nargs="*", type=directory_name, metavar="RUN_DIR", help="output directory of a run")
    parser.add_argument(
        "--output_dir", default="runs/report", type=directory_name, metavar="DIR",
        help="for report.md, losses.png, loss_by_time.png, memory_and_throughput.png and scaling.png, as far as the "
        "runs have what they show; with --run-all also for the runs; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--run-all", action="store_true", help="train with every technique first; flags that all of them have behind --"
    )
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser.parse_args(own)
    if args.run_all and args.runs:
        parser.error("--run-all makes its own runs: name no RUN_DIR beside it")
    if not args.run_all and flags:
        parser.error("flags behind -- go to the scripts of --run-all")
    if not args.run_all and not args.runs:
        parser.error("name one RUN_DIR at least, or --run-all")
    return args, flags


def main(argv: list[str] | None = None) -> int:
    args, flags = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        if args.run_all:
            from common.run_all import run_all

            directories, failed = run_all(Path(args.output_dir), flags, in_a_few_words)
        else:
            directories, failed = args.runs, []
        print(report(directories, args.output_dir, lambda line: print(line, file=sys.stderr, flush=True)))
        print(f"wrote {Path(args.output_dir) / 'report.md'}")
        if failed:
            raise UserError(f"{len(failed)} of the runs failed: {', '.join(failed)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
