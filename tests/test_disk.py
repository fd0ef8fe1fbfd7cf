"""The one rule for paths, and files that are bounded before they are read."""

import os
from pathlib import Path

import pytest

from stable_cascade.disk import local_path, read_file


def test_a_leading_tilde_is_the_home_folder_and_all_else_is_literal(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert local_path("~/a b/ü") == Path("/somewhere/a b/ü")
    assert local_path("~") == Path("/somewhere")
    for literal in ("$HOME/x", "a/~/b", "%TEMP%/x", "./~x", "s/{000..002}.tar"):
        assert str(local_path(literal)) == str(Path(literal))
    assert local_path(Path("~/x")) == Path("/somewhere/x")


def test_a_regular_file_is_read_up_to_its_bound(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_file(tmp_path / "a", at_most=5) == b"12345"
    with pytest.raises(ValueError, match=r"caption '.*a' has 5 bytes; at most 4 are read"):
        read_file(tmp_path / "a", at_most=4, what="caption")


@pytest.mark.parametrize(
    "make, fault",
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a folder; name a file"),
        (lambda path: os.mkfifo(path), "is a pipe or a device; only regular files are read"),
        (lambda path: path.symlink_to("/dev/zero"), "is a pipe or a device; only regular files are read"),
    ],
    ids=["missing", "folder", "fifo", "device behind a link"],
)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, make, fault):
    make(tmp_path / "x")
    with pytest.raises(ValueError) as error:
        read_file(tmp_path / "x", at_most=10)
    assert str(error.value) == f"file '{tmp_path / 'x'}' {fault}"
