"""README and docs: link targets exist, commands parse, config keys exist, and docs/configuration.md is up to date."""

import ast
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest

import main
from models import list_models
from scripts import document_config
from tests.conftest import FAST
from tests.launch import run_script
from utils.config.arguments import check_usage, overrides, parse_arguments
from utils.config.loading import flatten, load_config
from utils.errors import FAILED, STOPPED, USAGE_ERROR
from utils.stop import SIGNALS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, list[str]]]:
    """Return (file name of the page, words of the command) for every command in a bash code block."""
    page_commands = []
    for page in PAGES:
        for block in code_blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    page_commands.append((page.name, words))
    return page_commands


COMMANDS = commands()
MAIN_COMMANDS = [(page, words) for page, words in COMMANDS if any(word in ("main.py", "main_ema.py") for word in words)]
SCRIPTS = [(page, words) for page, words in COMMANDS if words[0] == "python" and words[1].startswith(("scripts/", "examples/"))]


def test_pages_contain_commands_of_known_programs_only():
    # Without commands, the other tests would have no cases, and would pass.
    assert len(MAIN_COMMANDS) > 10
    assert len(SCRIPTS) > 12
    others = {tuple(words[:2]) for page, words in COMMANDS if (page, words) not in MAIN_COMMANDS + SCRIPTS}
    assert {words[0] for words in others} <= {"bash", "hf", "sbatch", "pip", "python", "source", "torchrun", "mutmut"}
    assert [words[1] for words in others if words[0] == "bash" and not (ROOT / words[1]).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_existing_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_project_that_a_page_names_exist(page):
    folders = "analysis|benchmarks|configs|data|engine|examples|experiments|jobs|models|scripts|tests|utils"
    paths = re.findall(rf"`((?:{folders})/[\w/]+\.\w+)", page.read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(("page", "words"), MAIN_COMMANDS, ids=lambda value: value if isinstance(value, str) else "")
def test_main_py_commands_parse_and_their_configs_load(page, words, monkeypatch, tmp_path):
    start = next(index for index, word in enumerate(words) if word in ("main.py", "main_ema.py"))
    if "..." in words:
        pytest.skip("'...' marks a template for clusters, not a complete command")
    monkeypatch.chdir(ROOT)
    (tmp_path / "data").mkdir()
    arguments = [str(tmp_path / "data") if words[index - 1] == "--data-path" else word for index, word in enumerate(words)]
    monkeypatch.setattr(sys, "argv", arguments[start:])
    args = parse_arguments(main.__doc__)
    if args.replay:
        pytest.skip("--replay needs a file that a run has written")
    cfg = load_config(args.cfg, overrides(args)) if args.cfg else None
    if args.eval and args.resume.startswith("output/"):
        args.resume = args.cfg = __file__  # any existing file: there is no checkpoint in output/
    check_usage(args, cfg)


@pytest.mark.parametrize("script", sorted({words[1] for _, words in SCRIPTS}))
def test_scripts_have_the_flags_that_the_pages_use(script, tmp_path):
    flags: dict[tuple[str, ...], set[str]] = {}  # by subcommand, which follows the name of some scripts
    for _, words in SCRIPTS:
        if words[1] == script:
            subcommand = tuple(words[2:3]) if script.endswith("benchmark.py") else ()
            flags.setdefault(subcommand, set()).update(word for word in words if word.startswith("--"))
    module = import_module(script.removesuffix(".py").replace("/", "."))
    for subcommand, used in flags.items():
        outcome = run_script(module, [*subcommand, "--help"], tmp_path / "log")
        assert all(flag in outcome.output for flag in used), (script, used)


INLINE_PYTEST = [
    shlex.split(arguments)
    for page in PAGES
    for arguments in re.findall(r"`(?:\w+=1 )?(?:python -m )?pytest ([^`]+)`", page.read_text())
]
SELECTIONS = {tuple(words[2:]) for _, words in COMMANDS if words[:2] == ["bash", "scripts/test.sh"] and words[2:]}
SELECTIONS |= {tuple(arguments) for arguments in INLINE_PYTEST if not any(word.startswith("tests/") for word in arguments)}


@pytest.mark.parametrize("arguments", sorted(SELECTIONS), ids=" ".join)
def test_documented_selections_of_tests_are_not_empty(arguments, tmp_path):
    # Two files that together have tests for every selection: collecting all files would take longer.
    files = ["tests/models/test_swin.py", "tests/reliability/test_data.py"]
    outcome = run_script(pytest, ["--collect-only", "-q", "-p", "no:cacheprovider", *arguments, *files], tmp_path / "log")
    assert re.search(r"^tests/.+: [1-9]", outcome.output, re.MULTILINE), outcome.output


def test_documented_test_files_exist():
    paths = {word for arguments in INLINE_PYTEST for word in arguments if word.startswith("tests/")}
    mutated = re.search(r"^\[tool\.mutmut\]\n(.*?)(?=^\[|\Z)", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    paths |= set(re.findall(r'"([\w/]+\.py)"', mutated.group(1)))
    assert len(paths) > 5
    assert {path for path in paths if not (ROOT / path).exists()} == set()


def test_every_file_of_the_fast_tests_exists():
    assert {name for name in FAST if not (ROOT / "tests" / f"{name.replace('.', '/')}.py").is_file()} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_config_keys_exist_and_python_blocks_parse(page):
    known = flatten(load_config(ROOT / "configs/flatten_swin_t.yaml")).keys()
    sections = {key.rpartition(".")[0] for key in known}
    for key in re.findall(r"`((?:DATA|MODEL|TRAIN|AUG|EMA|TEST)\.[A-Z_.\d]+)", page.read_text()):
        assert key in known | sections | {"TRAIN.EPOCH"}, key  # TRAIN.EPOCH is an example of a misspelled key
    for block in code_blocks(page, "python"):
        ast.parse(block)


def models_in_readme() -> set[str]:
    """Names in the column "sizes"; in a row, names after the first are suffixes, such as ``_s`` after ``flatten_swin_t``."""
    names = set()
    for cell in re.findall(r"^\| FLatten-\S+ \|([^|]+)\|", (ROOT / "README.md").read_text(), re.MULTILINE):
        first, *suffixes = re.findall(r"`(\w+)`", cell)
        names |= {first} | {first.rpartition("_")[0] + suffix for suffix in suffixes}
    return names


def test_every_model_is_in_the_tables_of_the_readme_and_of_the_page_about_models():
    rows = re.findall(r"^\| `(flatten_\w+)` \|", (ROOT / "docs/models.md").read_text(), re.MULTILINE)
    assert sorted(rows) == list_models()
    assert sorted(models_in_readme()) == list_models()


def test_every_model_has_a_config():
    assert {load_config(ROOT / f"configs/{name}.yaml").MODEL.NAME for name in list_models()} == set(list_models())


def test_the_configuration_page_is_up_to_date():
    assert document_config.PAGE.read_text() == document_config.create_page(), "run python scripts/document_config.py"


def test_the_documented_exit_statuses_are_those_of_the_code():
    table = (ROOT / "docs/outputs.md").read_text().split("## Exit status")[1]
    documented = {int(number) for cell in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for number in cell.split(",")}
    assert documented == {0, FAILED, USAGE_ERROR, STOPPED, *(128 + number for number in SIGNALS)}
