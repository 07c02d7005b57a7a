"""The walls of the house: who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("models", "data", "utils")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
# Third-party libraries that enter through few doors.
DOORS = {
    "yaml": {"utils/config.py"},
    "tqdm": {"utils/log.py"},
    "termcolor": {"utils/log.py"},
    "safetensors": {"utils/checkpoint.py"},
    "matplotlib": {"utils/report.py"},
    "torchvision": {"data/index.py", "data/transforms.py", "utils/engine.py"},
}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, at its head or within."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_rooms_do_not_import_each_other_nor_main(path):
    room = path.relative_to(ROOT).parts[0]
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & ({*ROOMS, "main", "scripts", "tests"} - {room})


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_libraries_enter_through_their_doors(path):
    roots = {name.split(".")[0] for name in imports(path)}
    for library, doors in DOORS.items():
        assert library not in roots or relative(path) in doors


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_build_functions_see_the_config(path):
    """``cfg`` is a parameter of functions that build (or read the config) alone."""
    if relative(path) == "utils/config.py":
        return
    allowed = (
        "build_",
        "_build_",
        "_shared",
        "_create_loader",
        "amp_dtype",
        "eval_dtype",
        "accumulation_steps",
        "global_batch_size",
    )
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and any(argument.arg == "cfg" for argument in node.args.args):
            assert node.name.startswith(allowed), f"{relative(path)}: {node.name} takes cfg"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_prints_or_evaluates_text(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "eval", "exec"), f"{relative(path)}:{node.lineno}"


def test_there_is_one_focused_linear_attention():
    defined = [path for path in FILES if "class FocusedLinearAttention" in path.read_text()]
    assert [relative(path) for path in defined] == ["models/linear_attention.py"]
