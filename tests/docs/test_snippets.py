"""Python snippets of the README and of the site run in order, page by page, and print what they say."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPETS = {page: re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.S | re.M) for page in PAGES}
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("jax_defaults")]


def name_of(path):
    return str(path.relative_to(ROOT))


def test_there_are_snippets():
    assert len(SNIPPETS[ROOT / "README.md"]) >= 1
    assert len([page for page, snippets in SNIPPETS.items() if snippets]) >= 12
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("page", [page for page, snippets in SNIPPETS.items() if snippets], ids=name_of)
def test_page(page, capsys, tmp_path, monkeypatch):
    """What a line prints stands behind it."""
    monkeypatch.chdir(tmp_path)  # for those that write files
    code = "\n".join(SNIPPETS[page])
    for module in re.findall(r"^(?:import|from) (\w+)", code, flags=re.M):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    space = {"__name__": "snippet"}
    for snippet in SNIPPETS[page]:
        exec(compile(snippet, name_of(page), "exec"), space)
    said = re.findall(r"^print\(.*\)  # (.*)$", code, flags=re.M)
    assert capsys.readouterr().out.splitlines() == said


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebook(notebook, capsys, tmp_path, monkeypatch):
    """Cells run in order, and print what is stored with them."""
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "__main__"}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), name_of(notebook), "exec"), space)
            assert capsys.readouterr().out == "".join("".join(output["text"]) for output in cell["outputs"])
