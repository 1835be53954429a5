"""The READMEs' commands, quoted code, links, tables of flags and figures are up to date."""

import json
import re

from helpers import flag_tables
from helpers.launch import ROOT

READMES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_flag_tables_are_those_of_the_parsers():
    tables = flag_tables.tables()
    assert len(tables) == 5 and all(len(table) > 200 for table in tables.values())
    stale = [path for path, table in tables.items() if path.read_text() != flag_tables.with_table(path, table)]
    assert not stale, "run tests/helpers/flag_tables.py"


def test_second_command_is_the_one_that_ci_runs():
    install, test = blocks(ROOT / "README.md", "bash")[1].strip().split(" && ")
    ci = (ROOT / ".ci" / "run").read_text()
    assert install.split("install ")[1] in ci
    assert f"\n{test}\n" in ci


def test_quoted_lines_are_in_the_code():
    code = "\n".join(path.read_text() for path in ROOT.glob("*/*.py"))
    quoted = [
        line
        for path in READMES
        for block in blocks(path, "python")
        for line in block.splitlines()
        # Quotes keep the indentation that they have in the code; commands for a reader to type have none.
        if block.startswith(" ") and line.strip()
    ]
    assert len(quoted) >= 5
    assert [line for line in quoted if line not in code] == []


def test_nothing_is_left_to_fill_in():
    assert [path for path in READMES if "@@" in path.read_text()] == []


def test_named_files_are_there():
    links = [(path, link) for path in READMES for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text())]
    assert len(links) >= 6
    assert [(path, link) for path, link in links if not (path.parent / link).exists()] == []


def test_speed_table_is_what_was_measured():
    text = (ROOT / "README.md").read_text()
    results = json.loads((ROOT / "tests" / "benchmarks" / "results" / "pipeline.json").read_text())
    shown = [
        "pipeline", "pipeline, 8 rows", "pipeline, liger", "pipeline, liger, 8 rows",
        "pipeline, liger, uniform split", "zero1", "zero1, 8 rows",
    ]  # fmt: skip
    for name in shown:
        result = results[name]
        peaks = " / ".join(f"{stage['gpu_peak_gib']:.1f}" for stage in result["stages"])
        row = f"| {result['tokens_per_second_per_gpu']:,} | {100 * result['mfu']:.1f} % | {peaks} |"
        assert row in text, (name, row)


def test_tables_of_two_gpus_are_what_was_measured():
    results = json.loads((ROOT / "tests" / "benchmarks" / "results" / "zero_scaling.json").read_text())
    text = (ROOT / "zero" / "README.md").read_text()
    for stage in (1, 2, 3):
        one, two = results[f"zero {stage}, 1 GPU"], results[f"zero {stage}, 2 GPUs"]
        speeds = one["tokens_per_second_per_gpu"], two["tokens_per_second_per_gpu"]
        row = (
            f"| {stage} | {speeds[0]:,} | {speeds[1]:,} | {speeds[1] / speeds[0]:.2f} | {one['gpu_peak_gib']:.1f} | "
            f"{two['gpu_peak_gib']:.1f} |"
        )
        assert row in text
    for name in ("zero 1, 1 GPU", "zero 1, 2 GPUs"):
        assert all(f"{speed:,}" in text for speed in results[name]["slowest_and_fastest_step"])


def test_table_of_two_t4s_is_what_was_measured():
    results = json.loads((ROOT / "tests" / "benchmarks" / "results" / "pipeline.json").read_text())
    text = (ROOT / "pipeline" / "README.md").read_text()
    for length in (1024, 512):
        result = results[f"as on two T4s, {length} tokens"]
        split = [re.search(r"\d+ decoder", line)[0].split()[0] for line in result["split"] if line.startswith("stage")]
        checkpointing = "on" if any("checkpointing: on" in line for line in result["split"]) else "off"
        peaks = [stage["gpu_peak_gib"] for stage in result["stages"]]
        assert max(peaks) < 13.5 and result["last_loss"] < result["first_loss"] - 2
        assert (
            f"| `--max_length {length}` | {' + '.join(split)} | {checkpointing} | "
            f"{' / '.join(f'{peak:.1f}' for peak in peaks)} | {result['first_loss']:.2f} → {result['last_loss']:.2f} |"
        ) in text


def test_fp16_is_what_was_measured():
    results = json.loads((ROOT / "tests" / "benchmarks" / "results" / "fp16.json").read_text())
    assert {*results} == {"zero 1", "zero 3", "offload 2", "offload 3", "pipeline"}
    for name, result in results.items():
        assert result["skipped_steps"][-1] == 11, name
        assert result["loss_scale"][0] == 2**28 and result["loss_scale"][-1] == 2**19, name
        assert result["largest_loss_difference"] < 3e-5 and "identical" in result["verify"], name


def test_profile_of_zero_1_shows_idle_gpus_in_the_slowest_step():
    results = json.loads((ROOT / "tests" / "benchmarks" / "results" / "zero1_steps.json").read_text())
    text = (ROOT / "zero" / "README.md").read_text()
    fastest, slowest = sorted(
        zip(results["rank 0"], results["rank 1"], strict=True), key=lambda ranks: ranks[0]["seconds"]
    )[::14]
    for rank_0, rank_1 in (fastest, slowest):
        kernels = sum(rank_0[kind] for kind in ("copies", "other kernels", "matrix products", "attention")) / 1000
        idle = rank_0["seconds"] - kernels - rank_0["communication"] / 1000
        shown = f"{rank_0['seconds']:.2f}", f"{kernels:.2f}", f"{idle:.2f}", f"{rank_1['communication'] / 1000:.2f}"
        assert all(f"{figure} s" in text for figure in shown), shown


def test_losses_on_conversations_are_what_was_measured():
    results = json.loads((ROOT / "tests/benchmarks/results/chats.json").read_text())
    text = " ".join((ROOT / "README.md").read_text().split())
    for result in results.values():
        assert all(f"{loss:.2f}" in text for loss in result["held_out_losses"][:2])
        assert f"{result['share_of_tokens']:.1%}".replace("%", " %") in text


def test_speed_table_of_the_baseline_is_what_was_measured():
    results = json.loads((ROOT / "tests" / "benchmarks" / "results" / "workshop" / "results.json").read_text())
    baseline = results["baseline"]
    for result in results.values():
        ratio = result["tokens_per_second"] / baseline["tokens_per_second"]
        row = (
            f"| {result['tokens_per_second']:,} | {ratio:.2f} | {result['step_time_s']:.3f} | "
            f"{result['gpu_peak_gib']:.1f} | {result['host_peak_gib']:.1f} |"
        )
        assert row in (ROOT / "baseline" / "README.md").read_text(), row
    shown = [baseline["tokens_per_second"], results["zero 1"]["tokens_per_second"]]
    assert all(f"{figure:,}" in (ROOT / "README.md").read_text() for figure in shown)
    # The bar of the comparison: at the same micro-batch and precision, on less memory.
    assert results["zero 1"]["tokens_per_second"] >= 1.3 * baseline["tokens_per_second"]
    assert results["zero 1"]["gpu_peak_gib"] < baseline["gpu_peak_gib"]


def test_speed_tables_of_zero_and_offload_are_what_was_measured():
    results = json.loads((ROOT / "tests" / "benchmarks" / "results" / "zero.json").read_text())
    for technique in ("zero", "offload"):
        text = (ROOT / technique / "README.md").read_text()
        for stage in (1, 2, 3):
            ours, theirs = results[f"{technique} {stage}"], results[f"Trainer, {technique} {stage}"]
            ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
            row = (
                f"| {ours['tokens_per_second']:,} | {ours['gpu_peak_gib']:.1f} | {theirs['tokens_per_second']:,} | "
                f"{theirs['gpu_peak_gib']:.1f} | {ratio:.2f} |"
            )
            assert row in text, (technique, stage, row)
    text = (ROOT / "offload" / "README.md").read_text()
    for name in ("offload 2, 15 GiB", "4 rows of documents", "4 documents, packed", "4 documents, padded"):
        result = results[name]
        row = (
            f"| {result['tokens_per_second']:,} | {result['samples_per_second']:.1f} | {result['step_time_s']:.3f} | "
            f"{result['gpu_peak_gib']:.1f} | {result['host_peak_gib']:.1f} |"
        )
        assert row in text, (name, row)
    assert f"{results['8B, 2 x 12 GiB']['tokens_per_second']:,} tok/s" in text
    text = (ROOT / "README.md").read_text()
    for name in ("zero 1", "zero 3", "offload 2, 15 GiB"):
        assert f"{results[name]['tokens_per_second']:,}" in text, name
