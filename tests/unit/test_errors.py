"""Errors that the input causes, as one line, and the type of an argument that names a directory."""

import argparse
import errno
from pathlib import Path

import pytest

from common.errors import UserError, command, directory_name, one_line


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (None, 0, ""),
        (UserError("two\nlines"), 1, "error: two lines\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1, "error: [Errno 2] No such file: 'x'\n"),
        (OSError(errno.ENOSPC, "No space left"), 1, "error: the disk is full; nothing was kept\n"),
        (OSError(errno.EDQUOT, "Quota exceeded"), 1, "error: the disk is full; nothing was kept\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_command_returns_the_exit_code_and_prints_one_line(raised, code, line, capsys):
    @command
    def main(argv):
        if raised:
            raise raised

    assert main([]) == code
    assert capsys.readouterr() == ("", line)


def test_command_returns_the_code_of_main_and_lets_bugs_through():
    assert command(lambda argv: len(argv))(["a", "b"]) == 2
    with pytest.raises(ZeroDivisionError):
        command(lambda argv: 1 // 0)([])


def test_one_line_joins_lines_cuts_and_names_the_type_of_an_empty_error():
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("abcdef", 3) == "abc"
    assert one_line(TimeoutError()) == "TimeoutError"


def test_directory_name_expands_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert directory_name("~/run") == "/home/someone/run"
    assert Path(directory_name("a/~b")) == Path("a/~b")
    with pytest.raises(argparse.ArgumentTypeError, match="expected a directory"):
        directory_name("")
