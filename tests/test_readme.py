"""Every Python snippet of the README runs as it stands, and the comments that say what it prints are right."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.S | re.M)
TITLES = [re.findall(r"^## (.*)$", TEXT[: TEXT.index(snippet)], flags=re.M)[-1] for snippet in SNIPPETS]

SLOW = "mobilenetv2|TrainStep|CachedStep"


def test_there_are_snippets():
    assert len(SNIPPETS) >= 5


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
@pytest.mark.parametrize(
    "snippet",
    [
        pytest.param(s, id=t, marks=[pytest.mark.slow] if re.search(SLOW, s) else [])
        for s, t in zip(SNIPPETS, TITLES, strict=True)
    ],
)
def test_snippet(snippet, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for those that write files
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})
    printed = re.findall(r"^print\(.*\)  # (.*)$", snippet, flags=re.M)
    assert capsys.readouterr().out.splitlines() == printed
