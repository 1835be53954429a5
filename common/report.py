"""Compares runs: a table and plots from the `metrics.jsonl` that every training script writes.

    python -m common.report runs/zero runs/offload runs/pipeline --output_dir runs/report
    python -m common.report --run-all --output_dir runs/report

The second command trains first: the baseline, ZeRO 1 to 3, offload 1 to 3 and the pipeline, one after the other, on
the same model and text (`common.run_all`). Flags after `--` are passed to every script.

If a directory holds several runs, the last one counts. A resumed run continues the curve: if a step appears twice, the
later record wins. A damaged line is skipped with a note.
"""

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path

from common.cli import ArgumentParser
from common.errors import UserError, command, directory_name
from common.files import atomic_path
from common.metrics import WARM_UP, Run
from common.tables import gib, shown, table

SAME_LOSS = 1e-4  # losses that differ less are equal within float32's rounding

# --------------------------------------------------------------------------------------------------- comparing


def baseline_of(run: Run, runs: list[Run]) -> Run | None:
    """Returns the baseline to compare with: of several, the one of the most similar model, hardware and GPU count."""

    def likeness(other: Run) -> tuple[bool, ...]:
        return other is run, same_model(other, run), other.memory_field == run.memory_field, other.gpus == run.gpus

    return max((other for other in runs if other.technique == "baseline"), key=likeness, default=None)


def same_model(one: Run, other: Run) -> bool:
    return all(one.start.get(field) == other.start.get(field) for field in ("model", "parameters"))


def ratio(value: float | None, baseline: float | None) -> float | None:
    return value / baseline if value is not None and baseline else None


def agreement(runs: list[Run]) -> str:
    """Returns a sentence on the losses of the runs that saw the same tokens at every step, or ""."""

    def losses(run: Run) -> dict[tuple[int, int], float]:
        return {(step["step"], step["tokens"]): step["loss"] for step in run.steps if "loss" in step}

    reference = baseline_of(runs[0], runs) or runs[0]
    expected = losses(reference)
    alike = [run for run in runs if same_model(run, reference) and losses(run).keys() == expected.keys()]
    if len(alike) < 2 or not expected:
        return ""
    largest, label, step = max(
        (abs(loss - expected[key]), run.label, key[0]) for run in alike for key, loss in losses(run).items()
    )
    who = ", ".join(run.label for run in alike)
    where = f"; the largest difference from {reference.label} is {largest:.1e} ({label}, step {step:,})"
    if not largest:
        return f"{who}: the same model, tokens and loss at each of {len(expected):,} steps."
    if largest > SAME_LOSS:
        return f"{who}: the same model and tokens at every step, but different losses{where}."
    same = f"the same model, the same tokens and, within {SAME_LOSS:g}, the same loss"
    return f"{who}: {same} at each of {len(expected):,} steps{where}."


# ----------------------------------------------------------------------------------------------------- table


def cells(run: Run, baseline: Run | None) -> dict[str, str]:
    """Returns a run's row of the table as {head: cell}."""
    before, after = run.evaluation("before"), run.evaluation("after", "epoch")
    speed = memory = None
    if baseline:
        speed = ratio(run.median("tokens_per_second"), baseline.median("tokens_per_second"))
    if baseline and run.memory_field == baseline.memory_field:
        memory = ratio(run.peak(run.memory_field), baseline.peak(run.memory_field))
    return {
        "technique": run.label if run.finished else f"{run.label}, unfinished",
        "stage": shown(run.zero.get("stage")),
        "offload": run.offload,
        "GPUs": f"{run.gpus}" if run.gpu else f"{run.gpus} (CPU)",
        "parameters": shown(run.start.get("parameters"), "{:,}"),
        "train loss": shown(run.steps[-1].get("loss") if run.steps else None, "{:.4f}"),
        "eval before": shown(before.get("loss"), "{:.4f}"),
        "eval after": shown(after.get("loss"), "{:.4f}"),
        "perplexity": shown(after.get("perplexity"), "{:,.2f}"),
        "tok/s/GPU": shown(run.median("tokens_per_second_per_gpu"), "{:,.0f}"),
        "MFU": shown(run.median("mfu"), "{:.1%}").replace("%", " %"),
        "samples/s": shown(run.samples_per_second, "{:,.1f}"),
        "GPU GiB": gib(run.peak("gpu_peak_gib")),
        "host GiB": gib(run.peak("host_peak_gib")),
        "speed": shown(speed, "{:.2f} ×"),
        "memory": shown(memory, "{:.2f} ×"),
    }


def caption(runs: list[Run]) -> str:
    """Returns what the columns mean, and what to know about these runs."""
    sentences = [
        "Train loss is the last step's; eval loss and perplexity are on held-out text. Tokens per second and MFU are "
        "medians over the steps, samples per second is documents over time; the first "
        f"{WARM_UP} steps after each start are left out. GPU GiB is the peak of the fullest GPU, host GiB that of all "
        "ranks on the first host together."
    ]
    if any(run.technique == "baseline" for run in runs):
        sentences.append(
            "Speed and memory are relative to the baseline: tokens per second of all GPUs together, and peak GPU GiB, "
            "on a CPU host GiB."
        )
    if not all(run.gpu for run in runs):
        sentences.append("On a CPU a rank counts as a GPU, ranks share the cores, and each loads its own libraries.")
    for run in runs:
        baseline = baseline_of(run, runs)
        if baseline and not same_model(run, baseline):
            sentences.append(f"{run.label} is compared with a baseline of another model, {baseline.label}.")
    texts = defaultdict(list)
    for run in runs:
        texts[run.start.get("dataset", "–")].append(run.label)
    if len(texts) > 1:
        of_each = "; ".join(f"{text}: {', '.join(labels)}" for text, labels in texts.items())
        sentences.append(f"These runs trained on different texts, so their losses are not comparable ({of_each}).")
    unfinished = [run.label for run in runs if not run.finished]
    if unfinished:
        sentences.append(f"Not finished: {', '.join(unfinished)}.")
    return " ".join(sentences)


# ----------------------------------------------------------------------------------------------------- report


def report(runs: list[Run], output_dir: Path) -> str:
    """Writes `report.md` and its plots; returns the table and the findings."""
    from common import plots

    names = [run.name for run in runs]
    parent = os.path.commonpath([run.directory.resolve() for run in runs])
    for run in runs:
        if names.count(run.name) > 1:
            run.label = f"{run.name} ({run.directory.resolve().relative_to(parent)})"
    rows = [cells(run, baseline_of(run, runs)) for run in runs]
    heads = list(rows[0])
    findings = [table(heads, [list(row.values()) for row in rows], ["technique", "offload"]), caption(runs)]
    findings += filter(None, [agreement(runs)])
    figures, pictures, facts = plots.draw(runs), [], []
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        if isinstance(figure, str):
            findings.append(f"No {name}: {figure}.")
            (output_dir / name).unlink(missing_ok=True)  # of an earlier report
            continue
        with atomic_path(output_dir / name) as path:
            figure.savefig(path, format="png", dpi=150)
        pictures.append(f"![{figure.get_suptitle()}]({name})")
    for run in runs:
        seconds = max((record["elapsed"] for record in (*run.steps, *run.evals)), default=0)
        facts.append(
            f"- {run.label}: {run.start.get('model', '–')} on {run.start.get('dataset', '–')}, {len(run.steps):,} "
            f"steps in {seconds:,.0f} s, {run.gpus_in_words} ({run.gpu or 'CPU'}), `{run.directory}`"
        )
    with atomic_path(output_dir / "report.md") as path:
        text = "\n\n".join(["# Training runs", *findings, *pictures, "\n".join(facts)])
        path.write_text(text + "\n", encoding="utf-8")
    return "\n\n".join(findings)


def losses_in_brief(directory: Path) -> str:
    """Returns a run's losses for a progress line."""
    row = cells(Run(directory, warn=lambda line: None), None)
    return f"train loss {row['train loss']}, on held-out text {row['eval before']} to {row['eval after']}"


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = ArgumentParser(
        prog="python -m common.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=directory_name, metavar="RUN_DIR", help="output directory of a run")
    parser.add_argument(
        "--output_dir", default="runs/report", type=directory_name, metavar="DIR",
        help="for report.md and its plots, with --run-all also for the runs; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--run-all", action="store_true", help="train with every technique first; see above")
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser.parse_args(own)
    if args.run_all == bool(args.runs):
        parser.error("expected either RUN_DIR, one or more, or --run-all")
    if flags and not args.run_all:
        parser.error("flags after -- are for the scripts of --run-all")
    return args, flags


@command
def main(argv: list[str] | None = None) -> None:
    args, flags = parse_args(sys.argv[1:] if argv is None else argv)
    output_dir, directories = Path(args.output_dir), args.runs
    failed: list[str] = []
    if args.run_all:
        from common.run_all import run_all

        directories, failed = run_all(output_dir, flags, losses_in_brief)
    directories = {Path(directory).resolve(): directory for directory in directories}.values()  # each once
    runs = [Run(directory, lambda line: print(line, file=sys.stderr)) for directory in directories]
    print(report(runs, output_dir))
    print(f"wrote {output_dir / 'report.md'}")
    if failed:
        raise UserError(f"{len(failed)} of the runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    sys.exit(main())
