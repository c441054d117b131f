"""Sections that scripts write into a Markdown file, and the files with the results that these are made of."""

import doctest
import json
import sys

import pytest

from research import json_lines, results


def test_examples_in_docstrings():
    assert doctest.testmod(results).failed == 0


def test_a_section_is_put_at_the_end_and_then_renewed(tmp_path):
    file = tmp_path / "tables.md"
    file.write_text("# Results\n")
    results.write_section(file, "a", "first")
    results.write_section(file, "b", "second\n")
    results.write_section(file, "a", "third")
    assert file.read_text() == (
        "# Results\n\n<!-- a -->\nthird\n<!-- end of a -->\n\n<!-- b -->\nsecond\n<!-- end of b -->\n"
    )


def test_a_section_without_an_end_is_not_guessed_at(tmp_path):
    file = tmp_path / "tables.md"
    file.write_text("<!-- a -->\ntext by hand\n")
    with pytest.raises(ValueError, match=r"<!-- a -->.*without.*<!-- end of a -->.*add that line"):
        results.write_section(file, "a", "new")
    assert file.read_text() == "<!-- a -->\ntext by hand\n"


@pytest.mark.parametrize("asked", [False, True])
def test_what_is_published_is_printed_written_and_put_into_its_section(tmp_path, capsys, asked):
    whole = tmp_path / "tables.md"
    results.publish("| a |", tmp_path / "own.md", section="table", results=whole if asked else None)
    assert capsys.readouterr().out == (tmp_path / "own.md").read_text() == "| a |\n"
    assert whole.exists() == asked
    if asked:
        assert whole.read_text() == "<!-- table -->\n| a |\n<!-- end of table -->\n"


def test_provenance_names_command_and_versions(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--seeds", "3", "--only", "a b"])
    text = results.provenance("research.trials.closed_loop")
    assert text.startswith("`python -m research.trials.closed_loop --seeds 3 --only 'a b'`; commit ")
    assert "jax 0." in text


def test_a_line_that_was_cut_off_is_left_out_and_overwritten(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert json_lines.read(file, dict) == []
    json_lines.append(file, {"n": 1})
    whole = file.read_text()
    file.write_text(f'{whole}{{"n": 2, "lo')
    assert json_lines.read(file, dict) == [{"n": 1}]
    json_lines.append(file, {"n": 3})
    assert json_lines.read(file, dict) == [{"n": 1}, {"n": 3}]
    file.write_text(f'{{"n": 2, "lo\n{whole}')
    with pytest.raises(ValueError, match=r"out: line 1 of .*rows\.jsonl is not a result .*; remove it, or choose"):
        json_lines.read(file, dict)
    for damaged in ("1", "[1]"):
        file.write_text(f"{damaged}\n")
        with pytest.raises(ValueError, match=r"out: line 1 of .*rows\.jsonl is not a result"):
            json_lines.read(file, dict)


def test_lines_are_strict_json_and_nan_is_null(tmp_path):
    file = tmp_path / "rows.jsonl"
    json_lines.append(file, {"loss": float("nan"), "of": [float("inf"), (0.5, "x")], "more": {"no": float("nan")}})
    (line,) = file.read_text().splitlines()
    fields = json.loads(line, parse_constant=pytest.fail)
    assert {name: fields[name] for name in ("loss", "of", "more")} == {
        "loss": None, "of": [None, [0.5, "x"]], "more": {"no": None}
    }  # fmt: skip
    read = json_lines.with_nan(fields)
    assert read["loss"] != read["loss"]
    assert read["of"] == fields["of"]


def test_lines_have_their_commit(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"n": 1}\n')
    for commit in ("abc", "abc", "abd-dirty"):
        monkeypatch.setattr(json_lines, "commit", lambda commit=commit: commit)
        json_lines.append(file, {"n": 2})
    assert json_lines.read(file, dict) == [{"n": 1}, {"n": 2}, {"n": 2}, {"n": 2}]
    at = "abc (2), abd-dirty (1), unknown (1)"
    assert json_lines.commits(file, tmp_path / "none") == f"Commits of its 4 results: {at}."
