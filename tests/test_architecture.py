"""Import boundaries between the packages, and coding rules for the library code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Package -> other project packages that it may import.
ALLOWED = {
    "models": set(),
    "utils": set(),
    "data": {"models", "utils"},
    "analysis": {"models", "utils"},
    "engine": {"data", "models", "utils"},
    "jobs": {"analysis", "data", "engine", "models", "utils"},
}
FILES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]
# Third-party library -> the only files that may import it.
IMPORTERS = {
    "yaml": {"utils/config/reading.py"},
    "tqdm": {"utils/progress.py", "models/checkpoints/download.py"},
    "termcolor": {"utils/log.py"},
    "huggingface_hub": {"jobs/hub.py"},
    "pyarrow": {"data/rows.py"},
    "safetensors": {"jobs/export.py", "models/checkpoints/reader.py"},
    "matplotlib": {"engine/report.py", "analysis/curves.py", "analysis/pictures.py"},
    "torchvision": {"data/decoding.py", "data/transforms.py", "engine/metrics_writer.py"},
}


def imports(path: Path) -> set[str]:
    """Names of the modules that a file imports, at the top level or inside functions."""
    names, package = set(), path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()  # of a relative import
            names.add(".".join([*start, *filter(None, [node.module])]))
    return names


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_package_imports_only_allowed_project_packages(path):
    package = path.relative_to(ROOT).parts[0]
    top_level_names = {name.split(".")[0] for name in imports(path)}
    assert not top_level_names & ({*ALLOWED, "benchmarks", "main", "scripts", "tests"} - {package} - ALLOWED[package])


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_third_party_library_is_imported_only_by_allowed_files(path):
    top_level_names = {name.split(".")[0] for name in imports(path)}
    for library, importers in IMPORTERS.items():
        assert library not in top_level_names or relative(path) in importers


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_build_functions_and_a_few_listed_functions_take_the_config(path):
    """A function with a parameter ``cfg`` has a name that starts with an entry of ``allowed`` or ends with ``_arguments``.

    ``engine`` and ``jobs`` are exempt: an option of training is read where it is used, and not copied through other objects.
    """
    if path.parent.name == "config" or path.relative_to(ROOT).parts[0] in ("engine", "jobs"):
        return
    allowed = (
        "build_",
        "_build_",
        "_create_loader",
        "image_size",
        "check_usage",
        "apply_numerical_settings",
    )
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and any(
            argument.arg == "cfg" for argument in [*node.args.args, *node.args.kwonlyargs]
        ):
            assert node.name.startswith(allowed) or node.name.endswith("_arguments"), f"{relative(path)}: {node.name} takes cfg"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_library_code_does_not_call_print_eval_or_exec(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "eval", "exec"), f"{relative(path)}:{node.lineno}"


def test_focused_linear_attention_is_defined_in_one_file():
    defined = [path for path in FILES if "class FocusedLinearAttention" in path.read_text()]
    assert [relative(path) for path in defined] == ["models/linear_attention.py"]


def test_functions_outside_the_tests_have_at_most_60_lines():
    packages = [*ALLOWED, "benchmarks", "examples", "scripts"]
    paths = [*ROOT.glob("*.py"), *(path for package in packages for path in (ROOT / package).rglob("*.py"))]
    lengths = {
        f"{relative(path)}: {node.name}": node.end_lineno - node.lineno + 1
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert len(lengths) > 500
    assert {name: length for name, length in lengths.items() if length > 60} == {}
