"""The order of the folders, and how large files, folders and functions may be."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each imports from those before it alone.
FOLDERS = (
    "pytrees", "jaxprs", "layers", "predictor", "policies", "callbacks", "freezing", "cost", "programs", "caching",
    "learning", "nnx", "linen", "integrations",
)  # fmt: skip
# Of the repository: the library knows nothing of the networks, these nothing of the scripts, and so on.
PACKAGES = ("smartfrz_jax", "models", "train", "research", "benchmarks", "tests")
FILES = sorted(
    path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if not any(part.startswith((".", "__pycache__")) for part in path.relative_to(ROOT).parts)
)
SOURCES = [path for path in FILES if path.is_relative_to(ROOT / "smartfrz_jax")]


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, and of the names that it imports from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_between_folders_point_one_way(folder):
    behind = {name for name in FOLDERS if FOLDERS.index(name) > FOLDERS.index(folder)}
    for path in (ROOT / "smartfrz_jax" / folder).rglob("*.py"):
        for name in imported(path):
            package, _, rest = name.partition(".")
            assert package != "smartfrz_jax" or rest.split(".")[0] not in behind, f"{path} imports {name}"


def test_every_folder_of_the_library_has_its_place():
    there = {path.relative_to(ROOT / "smartfrz_jax").parts[0] for path in SOURCES if path.parent.name != "smartfrz_jax"}
    assert there == set(FOLDERS)


@pytest.mark.parametrize("package", PACKAGES[:4])  # whoever measures and tests may look everywhere
def test_imports_between_packages_point_one_way(package):
    behind = set(PACKAGES[PACKAGES.index(package) + 1 :])
    for path in FILES:
        if path.is_relative_to(ROOT / package):
            assert not {name.partition(".")[0] for name in imported(path)} & behind, path


def test_files_are_of_a_size_to_be_read():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 350} == {}


def test_folders_are_of_a_size_to_be_overlooked():
    folders: dict[str, int] = {}
    for path in FILES:
        if path.name != "__init__.py":
            folder = str(path.parent.relative_to(ROOT))
            folders[folder] = folders.get(folder, 0) + 1
    assert {folder: files for folder, files in folders.items() if files > 12} == {}


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_functions_are_of_a_size_to_be_understood():
    long = {}
    for path in FILES:
        for function in functions(path):
            lines = function.end_lineno - function.lineno + 1
            if lines > 80:
                long[f"{path.relative_to(ROOT)}:{function.name}"] = lines
    assert long == {}


def test_functions_take_few_parameters():
    """But for networks, whose hyperparameters are keywords with defaults, as those of Flax's modules are."""
    many = {}
    for path in FILES:
        for function in functions(path):
            arguments = function.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            count = len([argument for argument in named if argument.arg not in ("self", "cls")])
            is_network = path.parent == ROOT / "models" and function.name == "__init__"
            if count > 8 and not is_network:
                many[f"{path.relative_to(ROOT)}:{function.name}"] = count
    assert many == {}


def test_no_text_names_this_machine():
    """Nor a registry of packages."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout, so which files belong to the repository is unknown")
    hosts = [word + ".org" for word in ("pypi", "pythonhosted", "files.pythonhosted")]
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".cfg", ".cff", ".jsonl", ""}
            and path.is_file()
        ):
            text = path.read_text(errors="ignore")
            for word in (*hosts, "/" + "root/", "/" + "work/main"):
                assert word not in text, f"{name} names {word}"
