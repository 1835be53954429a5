"""The table's cells from files with known numbers, what happens to broken ones, and that the plots show the runs."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from common import report, run_all
from helpers.launch import ROOT

STEPS = 8


def zero_config(stage, **offload):
    devices = {f"offload_{what}": {"device": device} for what, device in offload.items()}
    return {"zero_optimization": {"stage": stage, **devices}}


def start(technique="zero", world_size=2, *, gpu="NVIDIA H200", ds_config=None, resumed=None, **fields):
    args = {"resume_from_checkpoint": resumed, "num_stages": None} | fields.pop("args", {})
    return {
        "event": "run", "time": 1000.0, "technique": technique, "world_size": world_size, "model": "llama",
        "dataset": "abstracts", "parameters": 1_235_814_400, "args": args, "hardware": {"gpu": gpu},
        **({"ds_config": ds_config} if ds_config else {}), **fields,
    }  # fmt: skip


def step(number, rate=1000.0, *, ranks=2, loss=None, time=None, **fields):
    return {
        "event": "step", "time": 1000.0 + number if time is None else time, "step": number,
        "loss": 5 - number / 10 if loss is None else loss, "tokens": 500, "step_time_s": 0.5,
        "tokens_per_second": rate, "tokens_per_second_per_gpu": rate / ranks, "samples_seen": 7 * number,
        "host_peak_gib": 20.0 + number / 100, **fields,
    }  # fmt: skip


def evaluation(number, phase, loss, perplexity=12.5):
    return {
        "event": "eval", "time": 1000.5 + number, "step": number, "phase": phase, "loss": loss,
        "perplexity": perplexity,
    }  # fmt: skip


SUMMARY = {"event": "summary", "time": 1100.0}


def whole_run(rate=1000.0, *, steps=STEPS, ranks=2, mfu=None, gpu_peak_gib=None, **start_fields):
    """A run whose first three steps are a hundred times slower than the others, the last half as fast."""
    speeds = [rate / 100] * 3 + [rate] * (steps - 4) + [rate / 2]
    extra = {"mfu": mfu, "gpu_peak_gib": gpu_peak_gib}
    extra = {key: value for key, value in extra.items() if value is not None}
    return [
        start(world_size=ranks, **start_fields),
        evaluation(0, "before", 7.25),
        *(step(number, speed, ranks=ranks, **extra) for number, speed in enumerate(speeds, start=1)),
        evaluation(steps, "after", 3.125),
        evaluation(steps, "test", 9.9, 99.9),
        SUMMARY,
    ]


def save(directory, records):
    """Writes records, or lines of bytes, as that run's metrics.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    (directory / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return directory


def read(directory):
    """The run, and what was said about lines that were skipped."""
    said = []
    return report.read_run(directory, said.append), said


def tabulate(output_dir):
    """The rows of the report's table, {heading: cell} each."""
    lines = [line for line in (output_dir / "report.md").read_text().splitlines() if line.startswith("|")]
    heading, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert all(set(cell) <= {"-", ":"} for cell in rule)
    assert len({len(line) for line in lines}) == 1  # the columns line up
    return [dict(zip(heading, row, strict=True)) for row in rows]


@pytest.fixture
def compare(tmp_path, capsys):
    """Reports on {directory: records}; returns (table, standard output, standard error)."""

    def run(runs):
        directories = [str(save(tmp_path / name, records)) for name, records in runs.items()]
        assert report.main([*directories, "--output_dir", str(tmp_path / "out")]) == 0
        return tabulate(tmp_path / "out"), *capsys.readouterr()

    return run


# ------------------------------------------------------------------------------------------------------ table


def test_every_cell(compare, tmp_path):
    offloaded = zero_config(3, optimizer="cpu", param="nvme")
    table, out, err = compare({
        "b": whole_run(20_000, ranks=1, mfu=0.3, gpu_peak_gib=40.0, technique="baseline"),
        "z": whole_run(30_000, mfu=0.2345, gpu_peak_gib=30.0, ds_config=zero_config(2, optimizer="none")),
        "o": whole_run(9_000, gpu_peak_gib=8.0, technique="offload", ds_config=offloaded),
        "p": whole_run(36_000, ranks=4, technique="pipeline", ds_config=zero_config(1), args={"num_stages": 2}),
    })  # fmt: skip
    assert err == ""
    common = {
        "parameters": "1,235,814,400", "train loss": "4.2000", "eval before": "7.2500", "eval after": "3.1250",
        "perplexity": "12.50", "samples/s": "14.0", "host GiB": "20.1",
    }  # fmt: skip
    assert table == [
        {
            "technique": "baseline", "stage": "–", "offload": "none", "GPUs": "1", **common, "tok/s/GPU": "20,000",
            "MFU": "30.0 %", "GPU GiB": "40.0", "speed": "1.00 ×", "memory": "1.00 ×",
        },
        {
            "technique": "zero", "stage": "2", "offload": "none", "GPUs": "2", **common, "tok/s/GPU": "15,000",
            "MFU": "23.4 %", "GPU GiB": "30.0", "speed": "1.50 ×", "memory": "0.75 ×",
        },
        {
            "technique": "offload", "stage": "3", "offload": "optimizer + parameters", "GPUs": "2", **common,
            "tok/s/GPU": "4,500", "MFU": "–", "GPU GiB": "8.00", "speed": "0.45 ×", "memory": "0.20 ×",
        },
        {
            "technique": "pipeline × 2", "stage": "1", "offload": "none", "GPUs": "4", **common, "tok/s/GPU": "9,000",
            "MFU": "–", "GPU GiB": "–", "speed": "1.80 ×", "memory": "–",
        },
    ]  # fmt: skip
    written = (tmp_path / "out" / "report.md").read_text()
    assert [line for line in out.splitlines() if line.startswith("|")] == [
        line for line in written.splitlines() if line.startswith("|")
    ]
    assert "Not finished" not in out


def test_on_a_cpu_memory_is_the_hosts(compare):
    table, *_ = compare({
        "b": whole_run(100, ranks=1, technique="baseline", gpu=None),
        "z": [start(gpu=None), step(1, host_peak_gib=50.2), step(2)],
    })  # fmt: skip
    baseline, row = table
    assert baseline["memory"] == "1.00 ×"
    assert row["technique"] == "zero, unfinished"
    assert (row["GPUs"], row["GPU GiB"], row["memory"]) == ("2 (CPU)", "–", "2.50 ×")  # 50.2 / 20.08


def test_what_is_not_in_the_file_is_a_dash(compare):
    bare = {"event": "run", "time": 0, "technique": "zero", "world_size": 2}
    table, out, _ = compare({"z": [bare], "y": [bare, {"event": "step", "time": 1, "step": 1}]})
    assert [row["technique"] for row in table] == ["zero (z), unfinished", "zero (y), unfinished"]
    for row in table:
        cells = {heading: cell for heading, cell in row.items() if heading not in ("technique", "offload", "GPUs")}
        assert set(cells.values()) == {"–"}
    assert "Not finished: zero (z), zero (y)." in out
    assert "No losses.png: no run has a step with a loss." in out


def test_the_baseline_of_the_same_model_and_gpus(compare):
    table, out, _ = compare({
        "other": whole_run(1, ranks=2, technique="baseline", model="bloom"),
        "one": whole_run(1000, ranks=1, technique="baseline"),
        "two": whole_run(2000, ranks=2, technique="baseline"),
        "z2": whole_run(4000, ranks=2, ds_config=zero_config(1)),
        "z1": whole_run(4000, ranks=1, ds_config=zero_config(2)),
        "far": whole_run(4000, ranks=2, ds_config=zero_config(3), model="gpt2", dataset="songs"),
    })  # fmt: skip
    speeds = [row["speed"] for row in table]
    assert speeds == ["1.00 ×", "1.00 ×", "1.00 ×", "2.00 ×", "4.00 ×", "4000.00 ×"]
    assert "zero 3 is compared with a baseline of another model, baseline (2 GPUs, other)." in out
    assert "different texts, so their losses do not compare (abstracts: baseline (2 GPUs, other), " in out
    assert "; songs: zero 3)." in out


def test_a_baseline_is_its_own(compare):
    table, *_ = compare({name: whole_run(rate, technique="baseline") for name, rate in (("a", 1000), ("b", 2000))})
    assert [row["speed"] for row in table] == ["1.00 ×", "1.00 ×"]


def test_without_a_baseline_nothing_is_relative(compare):
    table, out, _ = compare({"z": whole_run(ds_config=zero_config(1))})
    assert [(row["speed"], row["memory"]) for row in table] == [("–", "–")]
    assert "over the baseline's" not in out


def test_labels_are_unique(tmp_path):
    def labels(*runs):
        made = [
            read(save(tmp_path / name, [start(world_size=ranks, ds_config=zero_config(2))]))[0] for name, ranks in runs
        ]
        report.tell_apart(made)
        return [run.label for run in made]

    assert labels(("a", 2)) == ["zero 2"]
    assert labels(("a", 2), ("b", 4)) == ["zero 2 (2 GPUs)", "zero 2 (4 GPUs)"]
    assert labels(("a", 2), ("b", 2)) == ["zero 2 (a)", "zero 2 (b)"]
    assert labels(("a", 1), ("b", 2), ("c", 2)) == ["zero 2 (1 GPU)", "zero 2 (2 GPUs, b)", "zero 2 (2 GPUs, c)"]
    assert labels(("x/a", 2), ("y/a", 2)) == [f"zero 2 ({tmp_path}/x/a)", f"zero 2 ({tmp_path}/y/a)"]


def test_equal_losses_are_said_to_be_equal(compare):
    runs = {"z1": whole_run(ds_config=zero_config(1)), "z2": whole_run(ds_config=zero_config(2))}
    runs["z2"][5] |= {"loss": runs["z2"][5]["loss"] + 3e-5}
    runs["other"] = whole_run(ds_config=zero_config(3))
    runs["other"][5] |= {"tokens": 501}
    _, out, _ = compare(runs)
    assert (
        "zero 1, zero 2: the same model, the same tokens and, within 0.0001, the same loss at each of 8 steps; the "
        "largest difference from zero 1 is 3.0e-05 (zero 2, step 4)."
    ) in out
    runs["z2"][5] |= {"loss": 9.0}
    _, out, _ = compare(runs)
    assert (
        "zero 1, zero 2: the same model and tokens at every step, but other losses; the largest difference "
        "from zero 1 is 4.4e+00 (zero 2, step 4)."
    ) in out


# ----------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize(("line", "why"), [
    (b'{"event": "step", "time": 1001.0, "st', "not JSON: Unterminated string"),
    (b"", "not JSON: Expecting value at character 1"),
    (b"\0\0\0", "not JSON"),
    (b"[" * 100_000, "not JSON: nested too deeply"),
    (b"[1]", "not an object"),
    (b'"step"', "not an object"),
    (b'{"event": "step", "time": 1, "step": 9, "loss": NaN}', "NaN is not JSON"),
    (b'{"event": "step", "time": 1, "step": 9, "loss": 1e999}', 'loss of a step event is Infinity, expected a finite'),
    (b'{"event": "step", "time": 1, "step": 9, "loss": "2.5"}', 'loss of a step event is "2.5", expected a finite'),
    (b'{"event": "step", "time": 1, "step": 9, "mfu": true}', "mfu of a step event is true, expected a finite number"),
    (b'{"event": "step", "time": 1, "step": 0}', "step of a step event is 0, expected a whole number above 0"),
    (b'{"event": "step", "time": 1, "step": 2.5}', "step of a step event is 2.5"),
    (b'{"event": "step", "time": 1}', "step of a step event is missing"),
    (b'{"event": "step", "step": 9}', "time of a step event is missing"),
    (b'{"event": "eval", "time": 1, "step": 9, "phase": 1}', "phase of a eval event is 1, expected a line of text"),
    (b'{"event": "run", "time": 1, "technique": "zero"}', "world_size of a run event is missing"),
    (b'{"event": "run", "time": 1, "technique": "a\\ud800", "world_size": 1}', "technique of a run event"),
    (b'{"event": "stop", "time": 1}', 'event is "stop", expected one of run, step, eval, summary'),
    (b'{"time": 1}', "event is missing"),
    (b'{"event": ["step"], "time": 1}', 'event is ["step"]'),
    (b'\xff\xfe{"event": "summary"}', "'utf-8' codec can't decode byte 0xff"),
])  # fmt: skip
def test_a_broken_line_is_named_and_skipped(tmp_path, line, why):
    records = whole_run(ds_config=zero_config(2))
    whole, _ = read(save(tmp_path / "whole", records))
    run, said = read(save(tmp_path / "z", [*records[:4], line, *records[4:]]))
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path}/z/metrics.jsonl line 5: skipped ("), said
    assert why in said[0]
    assert "\n" not in said[0] and len(said[0]) < 400
    assert (run.start, run.steps, run.evals, run.finished) == (whole.start, whole.steps, whole.evals, whole.finished)


def test_what_is_skipped_is_said_on_standard_error(compare, tmp_path):
    table, out, err = compare({"z": [*whole_run(), b"{", b"[]"]})
    assert len(table) == 1 and "skipped (" not in out
    assert err == (
        f"{tmp_path}/z/metrics.jsonl line 14: skipped (not JSON: Expecting property name enclosed in double quotes at "
        f"character 2)\n{tmp_path}/z/metrics.jsonl line 15: skipped (not an object)\n"
    )


def test_a_last_line_cut_off_is_named_and_skipped(tmp_path):
    path = save(tmp_path / "z", whole_run(ds_config=zero_config(2))) / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.rstrip())  # nothing but the end of the line is missing
    assert read(path.parent)[1] == []
    path.write_bytes(whole[:-20])
    run, said = read(path.parent)
    assert [line.split(":")[0] for line in said] == [f"{path} line {len(whole.splitlines())}"]
    assert len(run.steps) == STEPS and not run.finished


def test_a_step_that_is_missing_changes_no_rate(tmp_path):
    records = whole_run()
    missing = next(record for record in records if record.get("step") == 6)
    run, _ = read(save(tmp_path / "z", [record for record in records if record is not missing]))
    assert len(run.steps) == STEPS - 1
    assert run.samples_per_second == 14.0


def test_records_before_a_run_are_skipped(tmp_path):
    run, said = read(save(tmp_path / "z", [step(1), *whole_run()]))
    assert said == [f"{tmp_path}/z/metrics.jsonl line 1: skipped (it comes before any run event)"]
    assert len(run.steps) == STEPS


@pytest.mark.parametrize(("prepare", "said"), [
    (lambda path: None, "holds no run: metrics.jsonl cannot be read (No such file or directory)"),
    (lambda path: path.mkdir(), "holds no run: metrics.jsonl cannot be read (No such file or directory)"),
    (lambda path: path.write_text("a file"), "holds no run: metrics.jsonl cannot be read (Not a directory)"),
    (lambda path: save(path, [b""]), "holds no run: metrics.jsonl has no run event"),
    (lambda path: save(path, [step(1)]), "holds no run: metrics.jsonl has no run event"),
    (lambda path: save(path / "zero", whole_run()), "name the runs inside it instead: {path}/zero"),
])  # fmt: skip
def test_a_directory_without_a_run_is_an_error(tmp_path, capsys, prepare, said):
    good, bad = save(tmp_path / "good", whole_run()), tmp_path / "bad"
    prepare(bad)
    assert report.main([str(good), str(bad), "--output_dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {bad} holds no run") and said.format(path=bad) in error
    assert not (tmp_path / "out").exists()


def test_an_output_dir_that_cannot_be_written(tmp_path, capsys):
    good = save(tmp_path / "good", whole_run())
    (tmp_path / "file").write_text("precious")
    assert report.main([str(good), "--output_dir", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith(f"error: --output_dir {tmp_path}/file cannot be written: ")
    assert (tmp_path / "file").read_text() == "precious"


def test_the_same_directory_twice_and_an_unknown_technique(tmp_path, capsys):
    run = save(tmp_path / "lora", whole_run(technique="lo|ra"))
    assert report.main([str(run), f"{run}/../lora", "--output_dir", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        f"{run}/../lora: named twice, shown once",
        f'{run}: technique "lo|ra" is none of baseline, zero, offload, pipeline; shown all the same',
    ]
    assert [line for line in out.splitlines() if line.startswith("| lo\\|ra ")]


@pytest.mark.parametrize("argv", [[], ["--run-all", "runs/zero"], ["runs/zero", "--", "--seed", "1"]])
def test_what_the_command_line_refuses(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        report.main(argv)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- several in a file


def test_a_resumed_run_goes_on_with_the_curve(tmp_path):
    run, said = read(save(tmp_path / "z", [
        start(), evaluation(0, "before", 7.0), *(step(number, loss=1.0) for number in range(1, 7)),
        evaluation(6, "epoch", 4.0),
        # Resumed from step 4 an hour later; its first step takes two seconds, as the first of any run may.
        start(time=5000.0, resumed="latest"),
        *(step(number, loss=2.0, time=4998.0 + number) for number in range(5, 11)),
        evaluation(10, "after", 3.0) | {"time": 5009.0}, SUMMARY,
    ]))  # fmt: skip
    assert said == []
    assert [record["step"] for record in run.steps] == [*range(1, 11)]
    assert [record["loss"] for record in run.steps] == [1.0] * 4 + [2.0] * 6
    assert [record["elapsed"] for record in run.steps] == [1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert [(record["phase"], record["elapsed"]) for record in run.evals] == [("before", 0.5), ("after", 13.0)]
    assert [record["step"] for record in run.measured] == [4, 8, 9, 10]
    assert run.finished
    assert run.samples_per_second == 14.0


def test_a_run_resumed_but_not_yet_ended_is_unfinished(tmp_path):
    first = [start(), *(step(number) for number in range(1, 7)), SUMMARY]
    run, _ = read(save(tmp_path / "z", [*first, start(time=2000.0, resumed="runs/z/global_step4"), step(5)]))
    assert [record["step"] for record in run.steps] == [1, 2, 3, 4, 5]
    assert not run.finished
    run, _ = read(save(tmp_path / "z", [*first, start(time=2000.0, resumed="latest"), SUMMARY]))  # nothing left to do
    assert len(run.steps) == 6 and run.finished


def test_a_new_run_in_the_same_directory_replaces_the_old(tmp_path):
    run, _ = read(save(tmp_path / "z", [*whole_run(), start("offload", 4, time=2000.0), step(1, time=2003.0)]))
    assert (run.technique, run.gpus, run.finished, run.evals) == ("offload", 4, False, [])
    assert [(record["step"], record["elapsed"]) for record in run.steps] == [(1, 3.0)]


# ------------------------------------------------------------------------------------------------------ plots


def holds(image, color):
    """Whether at least 50 pixels of an image, [height, width, 4], have that colour."""
    return (abs(image[..., :3] - to_rgb(color)) < 1 / 100).all(axis=-1).sum() >= 50


def test_plots_show_every_technique_in_its_accent(compare, tmp_path):
    compare({
        "b": whole_run(2000, ranks=1, technique="baseline", gpu_peak_gib=4.0),
        "z": whole_run(1500, ranks=1, ds_config=zero_config(2), gpu_peak_gib=3.0),
        "z2": whole_run(2700, ranks=2, ds_config=zero_config(2), gpu_peak_gib=3.0),
        "o": whole_run(900, technique="offload", ds_config=zero_config(2, optimizer="cpu"), gpu_peak_gib=2.0),
        "p": whole_run(1700, technique="pipeline", ds_config=zero_config(1), gpu_peak_gib=1.0),
    })  # fmt: skip
    out = tmp_path / "out"
    names = ["loss_by_time.png", "losses.png", "memory_and_throughput.png", "scaling.png"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "report.md"])
    for name in names:
        assert f"]({name})" in (out / "report.md").read_text()
        image = matplotlib.image.imread(out / name)
        assert image.shape[1] == 1200 and image.shape[0] > 300
        shown = {technique for technique, accent in report.ACCENTS.items() if holds(image, accent)}
        expected = {"baseline", "zero", "offload", "pipeline"} if name != "scaling.png" else {"zero"}
        assert shown - {"baseline"} == expected - {"baseline"}, name  # text is black too


def test_curves_that_coincide_can_all_be_seen(tmp_path):
    # Three runs of equal losses, the wide ones first: of each some part must stay uncovered.
    techniques = {"zero": zero_config(1), "offload": zero_config(1), "pipeline": zero_config(1)}
    runs = [
        read(save(tmp_path / name, whole_run(technique=name, ds_config=config, steps=60)))[0]
        for name, config in techniques.items()
    ]
    report.tell_apart(runs)
    report.assign_styles(runs)
    with matplotlib.rc_context(report.STYLE):
        figure = report.loss_plot(runs)
    assert figure.axes[0].get_title(loc="left").startswith("3 runs lie on top of each other")
    of_markers = [line.get_xdata() for line in figure.axes[0].get_lines()[1::3]]
    assert len(of_markers) == 3 and len({x for places in of_markers for x in places}) == sum(map(len, of_markers))
    figure.legends[0].remove()
    figure.savefig(tmp_path / "plot.png", dpi=150)
    image = matplotlib.image.imread(tmp_path / "plot.png")
    for name in techniques:
        assert holds(image, report.ACCENTS[name]), name


def test_colours_stay_apart_within_a_technique(tmp_path):
    runs = [read(save(tmp_path / str(number), whole_run(ds_config=zero_config(number))))[0] for number in (1, 2, 3)]
    report.assign_styles(runs)
    assert runs[-1].color == report.ACCENTS["zero"].lower()
    assert len({run.marker for run in runs}) == 3
    brightness = [np.mean(to_rgb(run.color)) for run in runs]
    assert brightness == sorted(brightness, reverse=True) and len(set(brightness)) == 3


def test_long_curves_are_means_of_several_steps(tmp_path):
    records = [start(), *(step(number, loss=number % 4) for number in range(1, 602))]
    runs = [read(save(tmp_path / "z", records))[0]]
    report.assign_styles(runs)
    axes = report.loss_plot(runs).axes[0]
    line = axes.get_lines()[0]
    assert [*line.get_xdata()] == [*range(1, 602, 4)]
    assert [*line.get_ydata()] == [1.0] + [1.5] * 150
    assert axes.get_ylabel() == "loss (nats a token), mean of 4 steps"


def test_scaling_needs_two_numbers_of_gpus(compare, tmp_path):
    runs = {f"z{ranks}": whole_run(1000 * ranks, ranks=ranks, ds_config=zero_config(2)) for ranks in (1, 4)}
    _, out, _ = compare(runs)
    assert (tmp_path / "out" / "scaling.png").exists() and "No scaling.png" not in out
    del runs["z4"]
    _, out, _ = compare(runs | {"other": whole_run(ranks=4, ds_config=zero_config(2), model="gpt2")})
    assert not (tmp_path / "out" / "scaling.png").exists()
    assert "No scaling.png: no technique ran the same model on two numbers of GPUs." in out
    assert "(scaling.png)" not in (tmp_path / "out" / "report.md").read_text()


def test_pictures_of_many_runs_with_long_names(tmp_path):
    runs = [
        read(save(tmp_path / f"{number:02}-{'long' * 20}", whole_run(ds_config=zero_config(1))))[0]
        for number in range(50)
    ]
    report.tell_apart(runs)
    report.assign_styles(runs)
    with matplotlib.rc_context(report.STYLE), warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's where it finds no room
        for draw in (report.loss_plot, report.time_plot, report.bar_plot):
            draw(runs).savefig(tmp_path / "plot.png")
        texts = [text.get_text() for text in report.loss_plot(runs).legends[0].get_texts()]
    assert len(texts) == report.MOST_NAMES + 2 and texts[-2:] == ["and 10 more", "on held-out text"]
    assert max(len(line) for text in texts for line in text.split("\n")) == 28
    assert len(set(texts)) == len(texts) and texts[0].startswith("zero 1 (00-")


def test_numbers_of_gpus_have_room_on_their_axis(tmp_path):
    runs = [
        read(save(tmp_path / str(ranks), whole_run(500 * ranks, ranks=ranks)))[0]
        for ranks in (1, 2, 4, 8, 64, 128, 250, 256)
    ]
    report.assign_styles(runs)
    assert sorted(report.scaling_plot(runs).axes[0].get_xticks()) == [8, 64, 128, 256]


def test_efficiency_is_said_in_the_scaling_plot(tmp_path):
    rates = {1: 1000, 2: 1800, 4: 3000}
    runs = [read(save(tmp_path / str(ranks), whole_run(rate, ranks=ranks)))[0] for ranks, rate in rates.items()]
    report.assign_styles(runs)
    axes = report.scaling_plot(runs).axes[0]
    line, ideal = axes.get_lines()
    assert (*line.get_xdata(), *line.get_ydata()) == (1, 2, 4, 1000, 1800, 3000)
    assert [*ideal.get_ydata()] == [1000, 2000, 4000]
    assert [text.get_text() for text in axes.texts] == ["zero: 75 %"]


def test_a_pipeline_scales_over_its_stages(tmp_path):
    runs = [
        read(save(tmp_path / str(ranks), whole_run(500 * ranks, ranks=ranks, technique="pipeline")))[0]
        for ranks in (2, 4)
    ]
    assert [run.name for run in runs] == ["pipeline × 2", "pipeline × 4"]
    report.assign_styles(runs)
    assert [text.get_text() for text in report.scaling_plot(runs).axes[0].texts] == ["pipeline: 100 %"]


def test_any_text_is_safe_in_a_plot(compare):
    compare({"a": whole_run(technique="$x^$"), "b": whole_run(technique="$x^$")})


# ---------------------------------------------------------------------------------------------------- command


def test_reading_needs_no_torch():
    code = "import sys, common.report; print(sorted({'torch', 'deepspeed', 'transformers'} & sys.modules.keys()))"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout == "[]\n"


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_all_runs_take_the_same_rows_a_step(gpus, ranks):
    plan = run_all.plan(gpus)
    assert [*plan] == ["baseline", "zero1", "zero2", "zero3", "offload1", "offload2", "offload3", "pipeline"]
    for name, (script, run_ranks, flags) in plan.items():
        given = dict(zip(run_all.FLAGS[::2], run_all.FLAGS[1::2], strict=False)) | dict(
            zip(flags[::2], flags[1::2], strict=True)
        )
        assert run_ranks == (1 if name == "baseline" else ranks)
        replicas = run_ranks // int(given.get("--num_stages", 1))
        assert int(given["--batch_size"]) * int(given["--accum_steps"]) * replicas == 8
        assert (ROOT / script).is_file()
        if "--deepspeed_config" in given:
            config = json.loads(Path(given["--deepspeed_config"]).read_text())["zero_optimization"]
            assert config["stage"] == int(name[-1])
            assert ("offload_optimizer" in config) == name.startswith("offload")
