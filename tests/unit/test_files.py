"""Files that appear complete or not at all, their checksums, and the disk space they need."""

import shutil

import pytest

from common import files
from common.errors import UserError


@pytest.mark.parametrize("kind", ["file", "directory", "link to a directory"])
def test_atomic_path_replaces_target_only_if_the_block_succeeds(tmp_path, kind):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"

    def write(path, content):
        if kind != "file":
            path.mkdir()
            path = path / "content"
        path.write_text(content)

    def read(path):
        return (path if kind == "file" else path / "content").read_text()

    write(elsewhere if "link" in kind else target, "old")
    if "link" in kind:
        target.symlink_to(elsewhere)
    (tmp_path / ".target.partial").mkdir()  # left by a killed process
    with pytest.raises(RuntimeError), files.atomic_path(target) as path:
        write(path, "half")
        raise RuntimeError
    assert read(target) == "old"
    with files.atomic_path(target) as path:
        write(path, "new")
        assert read(target) == "old"
    assert read(target) == "new" and not target.is_symlink()
    assert "link" not in kind or read(elsewhere) == "old"
    assert not list(tmp_path.glob(".*"))


def test_replace_failed_rename_puts_the_old_directory_back(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    for path in (source, target):
        path.mkdir()
        (path / path.name).touch()
    real = type(source).rename

    def rename(self, name):
        if self == source:
            raise OSError("cannot rename")
        return real(self, name)

    monkeypatch.setattr(type(source), "rename", rename)
    with pytest.raises(OSError, match="cannot rename"):
        files.replace(source, target)
    assert (target / "target").exists() and (source / "source").exists()


def test_recover_puts_back_what_a_killed_replace_left(tmp_path):
    target = tmp_path / "target"
    files.recover(target)
    assert not target.exists()
    for content in ("old", "again"):
        (tmp_path / ".target.old").mkdir()
        (tmp_path / ".target.old" / content).touch()
        files.recover(target)
        assert (target / "old").exists()  # the second time there is a new one already


def test_check_space_too_little_names_both_numbers(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    files.check_space(tmp_path / "not" / "there", free // 2, "to save")
    with pytest.raises(UserError, match=rf"{tmp_path} has .* GB free, .* GB are needed to save"):
        files.check_space(tmp_path, 2 * free, "to save")
