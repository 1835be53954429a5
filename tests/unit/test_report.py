"""The table's cells from files with known numbers, damaged files, and that the plots show the runs."""

import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb

from common import metrics, plots, report
from helpers.launch import ROOT
from helpers.run_records import STEPS, SUMMARY, evaluation, save, start, step, table_of, whole_run, zero_config


def read(directory):
    """The run, and the notes on lines that were skipped."""
    notes = []
    return metrics.Run(directory, notes.append), notes


def read_all(directory, **runs):
    """The runs with those records in those subdirectories."""
    return [read(save(directory / name, records))[0] for name, records in runs.items()]


@pytest.fixture
def compare(tmp_path, capsys):
    """Reports on {directory: records}; returns (table, standard output, standard error)."""

    def run(runs):
        directories = [str(save(tmp_path / name, records)) for name, records in runs.items()]
        assert report.main([*directories, "--output_dir", str(tmp_path / "out")]) == 0
        return table_of(tmp_path / "out"), *capsys.readouterr()

    return run


# ------------------------------------------------------------------------------------------------------ table


def test_table_of_known_files_has_every_cell(compare, tmp_path):
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
            "technique": "zero 2", "stage": "2", "offload": "none", "GPUs": "2", **common, "tok/s/GPU": "15,000",
            "MFU": "23.4 %", "GPU GiB": "30.0", "speed": "1.50 ×", "memory": "0.75 ×",
        },
        {
            "technique": "offload 3", "stage": "3", "offload": "optimizer + parameters", "GPUs": "2", **common,
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


def test_table_on_cpu_compares_host_memory(compare):
    table, *_ = compare({
        "b": whole_run(100, ranks=1, technique="baseline", gpu=None),
        "z": [start(gpu=None), step(1, host_peak_gib=50.2), step(2)],
    })  # fmt: skip
    baseline, row = table
    assert baseline["memory"] == "1.00 ×"
    assert row["technique"] == "zero, unfinished"
    assert (row["GPUs"], row["GPU GiB"], row["memory"]) == ("2 (CPU)", "–", "2.50 ×")  # 50.2 / 20.08


def test_table_without_a_field_shows_a_dash(compare):
    bare = {"event": "run", "time": 0, "technique": "zero", "world_size": 2}
    first_step = {"event": "step", "time": 1, "step": 1, "samples_seen": 0, "step_time_s": 0}
    table, out, _ = compare({"z": [bare], "y": [bare, first_step]})
    labels = ["zero (z)", "zero (y)"]
    assert [row["technique"] for row in table] == [f"{label}, unfinished" for label in labels]
    for row in table:
        cells = {heading: cell for heading, cell in row.items() if heading not in ("technique", "offload", "GPUs")}
        assert set(cells.values()) == {"–"}
    assert f"Not finished: {', '.join(labels)}." in out
    assert "No losses.png: no run has a step with a loss." in out


def test_speed_of_several_baselines_uses_the_same_model_and_gpus(compare):
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
    other = "baseline (other)"
    assert f"zero 3 is compared with a baseline of another model, {other}." in out
    assert f"different texts, so their losses are not comparable (abstracts: {other}, " in out
    assert "; songs: zero 3)." in out


def test_speed_of_a_baseline_is_relative_to_itself(compare):
    table, *_ = compare({name: whole_run(rate, technique="baseline") for name, rate in (("a", 1000), ("b", 2000))})
    assert [row["speed"] for row in table] == ["1.00 ×", "1.00 ×"]


def test_speed_without_a_baseline_is_a_dash(compare):
    table, out, _ = compare({"z": whole_run(ds_config=zero_config(1))})
    assert [(row["speed"], row["memory"]) for row in table] == [("–", "–")]
    assert "relative to the baseline" not in out


def test_labels_of_equal_runs_have_the_directory(compare):
    same = whole_run(ds_config=zero_config(2))
    table, *_ = compare({"x/a": same, "y/a": same, "c": whole_run(ds_config=zero_config(3))})
    assert [row["technique"] for row in table] == ["zero 2 (x/a)", "zero 2 (y/a)", "zero 3"]


def test_agreement_of_runs_names_the_largest_difference(compare):
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
        "zero 1, zero 2: the same model and tokens at every step, but different losses; the largest difference "
        "from zero 1 is 4.4e+00 (zero 2, step 4)."
    ) in out


# ----------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize(("line", "why"), [
    (b'{"event": "step", "time": 1001.0, "st', "Unterminated string"),
    (b"", "Expecting value"),
    (b"\0\0\0", ""),
    (b"[1]", "not an event"),
    (b'"step"', "not an event"),
    (b'{"time": 1}', "not an event"),
    (b'\xff{"event": "summary"}', "can't decode byte 0xff"),
])  # fmt: skip
def test_damaged_line_is_skipped_with_a_note(tmp_path, line, why):
    records = whole_run(ds_config=zero_config(2))
    whole, _ = read(save(tmp_path / "whole", records))
    run, notes = read(save(tmp_path / "z", [*records[:4], line, *records[4:]]))
    (note,) = notes
    assert note.startswith(f"{tmp_path}/z/metrics.jsonl line 5: skipped (")
    assert why in note
    assert (run.start, run.steps, run.evals, run.finished) == (whole.start, whole.steps, whole.evals, whole.finished)


def test_note_on_a_damaged_line_goes_to_standard_error(compare, tmp_path):
    table, out, err = compare({"z": [*whole_run(), b"{", b"[]"]})
    assert len(table) == 1 and "skipped (" not in out
    first, second = err.splitlines()
    assert first.startswith(f"{tmp_path}/z/metrics.jsonl line 14: skipped (Expecting property name")
    assert second == f"{tmp_path}/z/metrics.jsonl line 15: skipped (not an event)"


def test_cut_last_line_is_skipped_with_a_note(tmp_path):
    path = save(tmp_path / "z", whole_run(ds_config=zero_config(2))) / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.rstrip())  # only the line break is missing
    assert read(path.parent)[1] == []
    path.write_bytes(whole[:-20])
    run, notes = read(path.parent)
    assert [note.split(":")[0] for note in notes] == [f"{path} line {len(whole.splitlines())}"]
    assert len(run.steps) == STEPS and not run.finished


def test_missing_step_changes_no_rate(tmp_path):
    records = whole_run()
    missing = next(record for record in records if record.get("step") == 6)
    run, _ = read(save(tmp_path / "z", [record for record in records if record is not missing]))
    assert len(run.steps) == STEPS - 1
    assert run.samples_per_second == 14.0


def test_events_before_any_run_are_skipped_with_a_note(tmp_path):
    run, notes = read(save(tmp_path / "z", [step(1), *whole_run()]))
    assert notes == [f"{tmp_path}/z: skipped a step event before any run event"]
    assert len(run.steps) == STEPS


@pytest.mark.parametrize(("prepare", "said"), [
    (lambda path: None, "holds no run: metrics.jsonl cannot be read (No such file or directory)"),
    (lambda path: path.mkdir(), "holds no run: metrics.jsonl cannot be read (No such file or directory)"),
    (lambda path: path.write_text("a file"), "holds no run: metrics.jsonl cannot be read (Not a directory)"),
    (lambda path: save(path, [b""]), "holds no run: metrics.jsonl has no run event"),
    (lambda path: save(path, [step(1)]), "holds no run: metrics.jsonl has no run event"),
    (lambda path: save(path / "zero", whole_run()), "name the runs inside it instead: {path}/zero"),
])  # fmt: skip
def test_directory_without_a_run_is_one_error(tmp_path, capsys, prepare, said):
    good, bad = save(tmp_path / "good", whole_run()), tmp_path / "bad"
    prepare(bad)
    assert report.main([str(good), str(bad), "--output_dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {bad} holds no run") and said.format(path=bad) in error
    assert not (tmp_path / "out").exists()


def test_output_dir_that_is_a_file_is_an_error(tmp_path, capsys):
    good = save(tmp_path / "good", whole_run())
    (tmp_path / "file").write_text("precious")
    assert report.main([str(good), "--output_dir", str(tmp_path / "file")]) == 1
    assert f"File exists: '{tmp_path}/file'" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


def test_directory_named_twice_is_shown_once(tmp_path):
    run = save(tmp_path / "zero", whole_run())
    assert report.main([str(run), f"{run}/../zero", "--output_dir", str(tmp_path / "out")]) == 0
    assert len(table_of(tmp_path / "out")) == 1


def test_unknown_technique_is_shown(tmp_path, capsys):
    run = save(tmp_path / "lora", whole_run(technique="lo|ra"))
    assert report.main([str(run), "--output_dir", str(tmp_path / "out")]) == 0
    assert "\n| lo\\|ra " in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["--run-all", "runs/zero"], ["runs/zero", "--", "--seed", "1"]])
def test_command_line_without_runs_or_with_both_kinds_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        report.main(argv)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- several in a file


def test_resumed_run_continues_the_curve(tmp_path):
    run, notes = read(save(tmp_path / "z", [
        start(), evaluation(0, "before", 7.0), *(step(number, loss=1.0) for number in range(1, 7)),
        evaluation(6, "epoch", 4.0),
        # Resumed from step 4 an hour later; its first step takes two seconds, as the first of any run may.
        start(time=5000.0, resumed="latest"),
        *(step(number, loss=2.0, time=4998.0 + number) for number in range(5, 11)),
        evaluation(10, "after", 3.0) | {"time": 5009.0}, SUMMARY,
    ]))  # fmt: skip
    assert notes == []
    assert [record["step"] for record in run.steps] == [*range(1, 11)]
    assert [record["loss"] for record in run.steps] == [1.0] * 4 + [2.0] * 6
    assert [record["elapsed"] for record in run.steps] == [1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert [(record["phase"], record["elapsed"]) for record in run.evals] == [("before", 0.5), ("after", 13.0)]
    assert [record["step"] for record in run.measured] == [4, 8, 9, 10]
    assert run.finished
    assert run.samples_per_second == 14.0


def test_resumed_run_without_a_summary_is_unfinished(tmp_path):
    first = [start(), *(step(number) for number in range(1, 7)), SUMMARY]
    run, _ = read(save(tmp_path / "z", [*first, start(time=2000.0, resumed="runs/z/global_step4"), step(5)]))
    assert [record["step"] for record in run.steps] == [1, 2, 3, 4, 5]
    assert not run.finished
    run, _ = read(save(tmp_path / "z", [*first, start(time=2000.0, resumed="latest"), SUMMARY]))  # nothing left to do
    assert len(run.steps) == 6 and run.finished


def test_new_run_in_the_same_directory_replaces_the_old(tmp_path):
    run, _ = read(save(tmp_path / "z", [*whole_run(), start("offload", 4, time=2000.0), step(1, time=2003.0)]))
    assert (run.technique, run.gpus, run.finished, run.evals) == ("offload", 4, False, [])
    assert [(record["step"], record["elapsed"]) for record in run.steps] == [(1, 3.0)]


# ------------------------------------------------------------------------------------------------------ plots


def holds(image, color):
    """Whether at least 50 pixels of an image, [height, width, 4], have that colour."""
    return (abs(image[..., :3] - to_rgb(color)) < 1 / 100).all(axis=-1).sum() >= 50


def test_plots_show_every_technique_in_its_color(compare, tmp_path):
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
        colors = {technique: colormaps["tab20c"](shade) for technique, shade in plots.SHADES.items()}
        shown = {technique for technique, color in colors.items() if holds(image, color)}
        expected = {"baseline", "zero", "offload", "pipeline"} if name != "scaling.png" else {"zero"}
        assert shown - {"baseline"} == expected - {"baseline"}, name  # edges of text are gray too


def test_markers_of_equal_curves_are_at_different_steps(tmp_path):
    runs = read_all(
        tmp_path,
        z=whole_run(steps=60, ds_config=zero_config(1)),
        o=whole_run(steps=60, technique="offload", ds_config=zero_config(1)),
        p=whole_run(steps=60, technique="pipeline"),
    )
    places = [line.get_xdata() for line in plots.loss_by_step(runs).axes[0].get_lines()[1:9:3]]
    assert len(places) == 3 and all(len(each) >= 6 for each in places)
    assert len({x for each in places for x in each}) == sum(map(len, places))


def test_looks_of_stages_differ(tmp_path):
    runs = read_all(tmp_path, **{f"z{stage}": whole_run(ds_config=zero_config(stage)) for stage in (1, 2, 3)})
    looks = [plots.looks(run, runs) for run in runs]
    assert looks[0]["color"] == colormaps["tab20c"](plots.SHADES["zero"])
    assert len({each["marker"] for each in looks}) == 3
    brightness = [np.mean(to_rgb(each["color"])) for each in looks]
    assert brightness == sorted(brightness) and len(set(brightness)) == 3


def test_curve_of_many_steps_shows_means(tmp_path):
    runs = read_all(tmp_path, z=[start(), *(step(number, loss=number % 4) for number in range(1, 602))])
    axes = plots.loss_by_step(runs).axes[0]
    line = axes.get_lines()[0]
    assert [*line.get_xdata()] == [*range(4, 601, 4), 601]
    assert [*line.get_ydata()] == [1.5] * 150 + [1.0]
    assert axes.get_ylabel() == "loss (nats per token), mean of 4 steps"


def test_scaling_of_one_number_of_gpus_is_not_drawn(compare, tmp_path):
    runs = {f"z{ranks}": whole_run(1000 * ranks, ranks=ranks, ds_config=zero_config(2)) for ranks in (1, 4)}
    _, out, _ = compare(runs)
    assert (tmp_path / "out" / "scaling.png").exists() and "No scaling.png" not in out
    del runs["z4"]
    _, out, _ = compare(runs | {"other": whole_run(ranks=4, ds_config=zero_config(2), model="gpt2")})
    assert not (tmp_path / "out" / "scaling.png").exists()
    assert "No scaling.png: no technique ran the same model on two numbers of GPUs." in out
    assert "(scaling.png)" not in (tmp_path / "out" / "report.md").read_text()


def test_scaling_legend_has_the_efficiency(tmp_path):
    rates = {1: 1000, 2: 1800, 4: 3000}
    axes = plots.scaling(
        read_all(tmp_path, **{str(ranks): whole_run(rate, ranks=ranks) for ranks, rate in rates.items()})
    ).axes[0]
    line, ideal = axes.get_lines()
    assert (*line.get_xdata(), *line.get_ydata()) == (1, 2, 4, 1000, 1800, 3000)
    assert [*ideal.get_ydata()] == [1000, 2000, 4000]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["zero: 75% on 4"]


def test_scaling_of_a_pipeline_is_over_its_stages(tmp_path):
    runs = read_all(
        tmp_path, **{str(ranks): whole_run(500 * ranks, ranks=ranks, technique="pipeline") for ranks in (2, 4)}
    )
    assert [run.name for run in runs] == ["pipeline × 2", "pipeline × 4"]
    axes = plots.scaling(runs).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["pipeline: 100% on 4"]


def test_plots_of_names_with_dollar_signs_are_drawn(compare):
    compare({"a": whole_run(technique="$x^$"), "b": whole_run(technique="$x^$")})


# ---------------------------------------------------------------------------------------------------- command


def test_report_imports_no_torch():
    code = "import sys, common.report; print(sorted({'torch', 'deepspeed', 'transformers'} & sys.modules.keys()))"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout == "[]\n"
