"""Techniques import `common` and no other technique, and a diff of two scripts shows the technique."""

import ast
import difflib

import pytest

import common
from helpers.launch import ROOT

TECHNIQUES = ("baseline", "zero", "offload", "pipeline")


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


@pytest.mark.parametrize(("technique", "most"), [("offload", 90), ("pipeline", 147)])
def test_scripts_differ_in_their_technique_only(technique, most):
    one, other = ((ROOT / name / "train.py").read_text().splitlines() for name in ("zero", technique))
    changed = [line for line in difflib.ndiff(one, other) if line[0] in "+-"]
    assert len(changed) <= most


def imported_from_common(path):
    """Modules of `common` that a file imports, inside functions too."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "common":
            modules |= {node.module.split(".")[1]} if "." in node.module else {name.name for name in node.names}
    return modules


def test_library_and_commands_are_all_modules_of_common():
    modules = {path.stem for path in (ROOT / "common").glob("*.py")} - {"__init__"}
    assert len(modules) > 20 and not {*common.LIBRARY} & {*common.COMMANDS}
    assert {*common.LIBRARY, *common.COMMANDS} == modules


def test_training_scripts_and_the_library_import_no_command():
    library = [ROOT / "common" / f"{name}.py" for name in common.LIBRARY]
    for path in [*library, *(path for technique in TECHNIQUES for path in (ROOT / technique).glob("*.py"))]:
        assert imported_from_common(path) <= {*common.LIBRARY}, path
