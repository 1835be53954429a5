"""Techniques share `common` and nothing else: each works without the others, and a diff of two shows the technique."""

import ast
import difflib
import shutil
import subprocess
import sys

import pytest

from helpers.launch import ROOT, clean_environment

TECHNIQUES = ("baseline", "zero", "offload", "pipeline")
# Imports every module, parses each script's flags, and converts layer shards, in a repository without one directory.
USE_EVERYTHING = """
import importlib, runpy, sys
from pathlib import Path
import torch
from common import convert, run_all, sample

for path in sorted(Path().glob("*/*.py")):
    if path.name != "__init__.py":
        importlib.import_module(".".join(path.with_suffix("").parts))
assert {script.split("/")[0] for script, *_ in run_all.plan(2).values()} == set(sys.argv[2:])
run_all.check_flags(["--num_epochs", "2"])
model = str(sample.sample_model_directory("llama"))
assert convert.main(["to-pipeline", model, "--output_dir", "shards"]) == 0
assert convert.main(["to-hf", "shards", "--base_model", model, "--output_dir", "hf", "--verify"]) == 0
"""


@pytest.mark.parametrize("gone", TECHNIQUES)
def test_everything_else_works_without_a_technique(tmp_path, gone):
    others = [technique for technique in TECHNIQUES if technique != gone]
    for directory in (*others, "common"):
        shutil.copytree(ROOT / directory, tmp_path / directory, ignore=shutil.ignore_patterns("__pycache__"))
    finished = subprocess.run(
        [sys.executable, "-c", USE_EVERYTHING, gone, *others],
        cwd=tmp_path, env=clean_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "verify: weights identical" in finished.stdout


def imported(path):
    """Top-level packages of all imports of a file, those inside functions too."""
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.split(".")[0])
    return packages


@pytest.mark.parametrize("directory", [*TECHNIQUES, "common"])
def test_imports_stay_in_the_directory_and_in_common(directory):
    for path in (ROOT / directory).glob("*.py"):
        assert not imported(path) & (set(TECHNIQUES) - {directory}), path


@pytest.mark.parametrize(("technique", "most"), [("offload", 90), ("pipeline", 145)])
def test_scripts_differ_in_their_technique_only(technique, most):
    one, other = ((ROOT / name / "train.py").read_text().splitlines() for name in ("zero", technique))
    changed = [line for line in difflib.ndiff(one, other) if line[0] in "+-"]
    assert len(changed) <= most
