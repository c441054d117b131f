"""Pages of the site that lie outside of ``docs/``: raw tables stand beside the data, the changelog at the top."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

_TOP = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_TABLES = ("benchmarks/predictors", "benchmarks/closed_loop", "benchmarks/rehearsals", "benchmarks/kept_runs")
_FOLDERS = {
    folder: f"results/raw/{Path(folder).name}" for folder in (*_TABLES, "research/long_runs", "research/reproduce")
}
_KINDS = {".md", ".png"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds them to the site's files."""
    root = Path(config.config_file_path).parent
    for name, there in _TOP.items():
        files.append(File.generated(config, there, abs_src_path=str(root / name)))
    for folder, there in _FOLDERS.items():
        for path in sorted((root / folder).iterdir()):
            if path.suffix in _KINDS:
                page = File.generated(config, f"{there}/{path.name}", abs_src_path=str(path))
                page.inclusion = InclusionLevel.NOT_IN_NAV
                files.append(page)
    return files


def on_page_markdown(markdown: str, **rest: object) -> str:
    """Links that lead to raw tables in the repository lead to their pages."""
    for folder in _FOLDERS:
        markdown = markdown.replace(f"](../../{folder}/", f"](raw/{Path(folder).name}/")
    return markdown
