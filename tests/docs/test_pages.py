"""What the site says of names and figures is so."""

import importlib
import re
import types
from pathlib import Path

import pytest

import smartfrz_jax

ROOT = Path(__file__).parents[2]
RESULTS = sorted(
    path for path in (ROOT / "docs" / "results").glob("*.md") if path.stem not in {"index", "the-papers-tables"}
)
MODULES = ("nnx", "linen", "policies", "cost", "caching", "predictor", "learning", "callbacks")

# With decimals: counts and words are not in the raw tables as they stand on the pages.
FIGURE = re.compile(r"(?<![\d.])[-+]?\d+\.\d+")


def public(module):
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_of_a_module_is_on_its_page(name):
    described = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api" / f"{name}.md").read_text(), flags=re.M)
    module = importlib.import_module(f"smartfrz_jax.{name}")
    assert sorted(path.rpartition(".")[2] for path in described) == sorted(public(module))
    assert all(path.startswith(f"smartfrz_jax.{name}.") for path in described)


def test_every_name_at_the_top_is_in_the_table_and_described():
    page = (ROOT / "docs" / "api" / "index.md").read_text()
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\((\S+)\)", page, flags=re.M))
    assert sorted(rows) == sorted(public(smartfrz_jax))
    for link in rows.values():
        file, _, path = link.partition("#")
        text = (ROOT / "docs" / "api" / file).read_text() if file else page
        assert f"\n::: {path}\n" in text


@pytest.mark.parametrize("page", RESULTS, ids=lambda path: path.stem)
def test_figures_of_a_question_are_those_of_the_raw_tables(page):
    text = page.read_text()
    raw = "".join(
        (page.parent / link).read_text() for link in set(re.findall(r"\]\((\S+/(?:tables|results)\.md)\)", text))
    )
    known = set(re.findall(r"[-+]?\d+(?:\.\d+)?", raw))
    rows = [row for row in re.findall(r"^\| (.*) \|$", text, flags=re.M) if "---" not in row]
    figures = [figure for row in rows for cell in row.split(" | ")[1:] for figure in FIGURE.findall(cell)]
    assert len(figures) >= 4
    assert not [figure for figure in figures if figure not in known]


def test_figures_of_the_front_page_are_those_of_the_pages_it_links():
    readme = (ROOT / "README.md").read_text()
    section = re.search(r"^## What is saved$(.*?)^## ", readme, flags=re.S | re.M)[1]
    pages = [ROOT / link for link in set(re.findall(r"\]\((\S+\.md)\)", section))]
    known = {figure for page in pages for figure in FIGURE.findall(page.read_text())}
    rows = re.findall(r"^\| (.*) \|$", section, flags=re.M)
    figures = [figure for row in rows for figure in FIGURE.findall(row.partition(" | ")[2])]
    assert len(figures) >= 20
    assert not [figure for figure in figures if figure not in known]


def test_the_front_page_can_be_read_in_three_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    for paragraph in re.split(r"\n\n|\n(?=[-\d])", prose):
        if not paragraph.startswith("|"):
            words = re.sub(r"\]\(\S*\)|`[^`]*`|^\d\.", "", paragraph)  # neither links, nor code, nor numbers of a list
            assert len(re.findall(r"(?<![\w.])\d+(?:\.\d+)*", words)) <= 2, paragraph


@pytest.mark.parametrize("name", ["README.md", "BUILD.md", "CONTRIBUTING.md"])
def test_links_of_pages_at_the_top_lead_to_files(name):
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text())
    assert not [link for link in links if not (ROOT / link).exists()]
