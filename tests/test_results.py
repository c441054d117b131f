"""Sections that scripts write into a Markdown file."""

import doctest
import sys

import pytest

from train import results


def test_examples_in_docstrings():
    assert doctest.testmod(results).failed == 0


def test_a_section_is_put_at_the_end_and_then_renewed(tmp_path):
    file = tmp_path / "RESULTS.md"
    file.write_text("# Results\n")
    results.write_section(file, "a", "first")
    results.write_section(file, "b", "second\n")
    results.write_section(file, "a", "third")
    assert file.read_text() == (
        "# Results\n\n<!-- a -->\nthird\n<!-- end of a -->\n\n<!-- b -->\nsecond\n<!-- end of b -->\n"
    )


def test_a_section_without_an_end_is_not_guessed_at(tmp_path):
    file = tmp_path / "RESULTS.md"
    file.write_text("<!-- a -->\ntext by hand\n")
    with pytest.raises(ValueError, match=r"<!-- a -->.*without.*<!-- end of a -->.*add that line"):
        results.write_section(file, "a", "new")
    assert file.read_text() == "<!-- a -->\ntext by hand\n"


def test_provenance_names_command_and_versions(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--seeds", "3", "--only", "a b"])
    text = results.provenance("train.closed_loop")
    assert text.startswith("`python -m train.closed_loop --seeds 3 --only 'a b'`; commit ")
    assert "jax 0." in text
