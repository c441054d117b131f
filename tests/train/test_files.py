"""Files that scripts write anew are there whole at any moment."""

import os

import pytest

from research.results import write_section
from train.files import write_whole
from train.log import Log, Run, read


def test_a_file_is_made_renewed_and_followed_through_a_link(tmp_path):
    file, link = tmp_path / "a.md", tmp_path / "b.md"
    write_whole(file, "one")
    link.symlink_to(file)
    write_whole(link, "two")
    assert file.read_text() == "two"
    assert link.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"a.md", "b.md"}


@pytest.mark.parametrize(
    "write",
    [
        lambda file: write_whole(file, "new"),
        lambda file: Log(file, Run("never", ("a",))),
        lambda file: write_section(file, "table", "new"),
    ],
    ids=["write_whole", "Log", "write_section"],
)
def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path, monkeypatch, write):
    def killed(*names):
        raise KeyboardInterrupt

    file = tmp_path / "file"
    file.write_text("old")
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(file)
    assert file.read_text() == "old"


def test_a_log_that_cannot_be_written_anew_leaves_the_old_one(tmp_path):
    with Log(tmp_path / "log.jsonl", Run("never", ("a",))):
        pass
    with pytest.raises(TypeError, match="not JSON serializable"):
        Log(tmp_path / "log.jsonl", Run("freezeout", ("a",), {"x": object()}))
    assert read(tmp_path / "log.jsonl").name == "never"
