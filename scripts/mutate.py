"""Mutation testing: sample mutants of the code, and count how many of them the tests detect.

A mutant is the code with one small mistake: a comparison, an operator, a constant, a condition, an argument or a statement is
changed. The tests that execute the changed line are run on the mutant. The mutant is killed if one of them fails.

    python scripts/mutate.py record                      # run the tests once and record which lines each of them executes
    python scripts/mutate.py sample models data --number 60 --seed 0

``record`` runs the tests once with coverage, and needs ``coverage`` and ``pytest-cov``. ``sample`` prints every mutant that
survived, with its file, line and change. Many survivors are equivalent to the original code, so inspect each one.
"""

import argparse
import ast
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("main.py", "models", "data", "engine", "jobs", "utils", "analysis")
QUICK = 1.0  # seconds; tests that take less time are run first
RECORD = ".mutation"  # output directory of ``record``
COVERAGE_CONFIG = """
[run]
branch = true
parallel = true
relative_files = true
source = {source}
omit = */.venv/*, */tests/*
data_file = {data}
patch = fork, subprocess, _exit
disable_warnings = no-data-collected, module-not-imported, module-not-measured, already-imported, trace-changed
"""
COMPARISONS = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
OPERATORS = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "*",
    ast.Pow: "*",
}
# Built-in functions, each replaced by its opposite.
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
# Keyword arguments that are not mutated: they only check something or set a layout, so tests need not detect their mutants.
HARMLESS_KEYWORDS = {"strict", "missing_ok", "exist_ok", "indent", "fontsize", "rotation", "dpi", "figsize", "alpha", "shrink"}
REPORTING = {"logger", "warnings", "print"}  # statements that call these are not mutated: no test needs to check them


@dataclass(frozen=True)
class Mutant:
    """One change to a file: the source between the offsets ``start`` and ``end`` is replaced.

    Args:
        line: first line of the changed code.
        statement: first line of the statement that contains the change; coverage is recorded for this line.
        in_function: whether the statement is inside a function. Other statements are executed at import only.
        change: description of the change, for the output.
    """

    path: str
    line: int
    statement: int
    in_function: bool
    start: int
    end: int
    replacement: str
    change: str

    def apply(self, source: str) -> str:
        return source[: self.start] + self.replacement + source[self.end :]

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.change}"


class MutantFinder(ast.NodeVisitor):
    """Collects all mutants of a file, except for changes to docstrings, annotations, messages and log calls."""

    def __init__(self, path: str, source: str):
        self.path = path
        self.source = source
        line_offsets = [0]
        for line in source.splitlines(keepends=True):
            line_offsets.append(line_offsets[-1] + len(line))
        self.starts = line_offsets
        self.lines = source.splitlines()
        self.statement = 1
        self.depth = 0
        self.mutants: list[Mutant] = []

    def visit(self, node: ast.AST) -> None:
        outer_statement = self.statement
        if isinstance(node, ast.stmt):
            self.statement = node.lineno
        super().visit(node)
        self.statement = outer_statement

    def offset(self, line: int, column: int) -> int:
        """Convert a line and a column (in UTF-8 bytes, as in ``ast``) to an offset in the source, in characters."""
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def text(self, node: ast.AST) -> str:
        return ast.get_source_segment(self.source, node)

    def add(self, node: ast.AST, replacement: str, *, last: ast.AST | None = None) -> None:
        """Add a mutant that replaces ``node``, or, with ``last``, all source from ``node`` to the end of ``last``."""
        last = last or node
        start = self.offset(node.lineno, node.col_offset)
        end = self.offset(last.end_lineno, last.end_col_offset)
        original = " ".join(self.source[start:end].split())
        change = f"{original[:70]} -> {' '.join(replacement.split())[:70]}"
        self.mutants.append(Mutant(self.path, node.lineno, self.statement, self.depth > 0, start, end, replacement, change))

    # Nodes that are skipped as a whole or in part.

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_Import(self, node: ast.Import) -> None:
        pass

    visit_ImportFrom = visit_Import  # noqa: N815

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(default)
        self.depth += 1
        for statement in node.body:
            self.visit(statement)
        self.depth -= 1

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):  # a docstring
            return
        if isinstance(node.value, ast.Call):
            root = node.value.func
            while isinstance(root, (ast.Attribute, ast.Call)):
                root = root.value if isinstance(root, ast.Attribute) else root.func
            if isinstance(root, ast.Name) and root.id in REPORTING:
                return
            self.add(node, "pass")  # removes the call
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg not in HARMLESS_KEYWORDS:
            self.visit(node.value)

    # Nodes that are mutated.

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1:
            operator = COMPARISONS[type(node.ops[0])]
            self.add(node, f"({self.text(node.left)} {operator} {self.text(node.comparators[0])})")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in OPERATORS and not isinstance(node.left, (ast.JoinedStr, ast.List)):
            self.add(node, f"({self.text(node.left)} {OPERATORS[type(node.op)]} {self.text(node.right)})")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add(node, "pass")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        joined = " or " if isinstance(node.op, ast.And) else " and "
        self.add(node, "(" + joined.join(f"({self.text(value)})" for value in node.values) + ")")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, (ast.Not, ast.USub)):
            self.add(node, f"({self.text(node.operand)})")
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if not isinstance(node.test, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
            self.add(node.test, f"(not ({self.text(node.test)}))")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        test, body, orelse = (self.text(part) for part in (node.test, node.body, node.orelse))
        self.add(node, f"(({orelse}) if ({test}) else ({body}))")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.add(node, str(not node.value))
        elif isinstance(node.value, int):
            self.add(node, str(node.value + 1))
        elif isinstance(node.value, float):
            self.add(node, repr(2 * node.value if node.value else 1.0))

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in NAMES:
            self.add(node, NAMES[node.id])

    def visit_Call(self, node: ast.Call) -> None:
        """Swap the first two arguments."""
        unstarred = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
        if len(unstarred) == len(node.args) >= 2 and not isinstance(node.args[0], ast.Constant):
            first, second = node.args[:2]
            self.add(first, f"{self.text(second)}, {self.text(first)}", last=second)
        self.generic_visit(node)


def find_mutants(paths: list[str]) -> list[Mutant]:
    files = [
        file for path in paths for file in (sorted((ROOT / path).rglob("*.py")) if (ROOT / path).is_dir() else [ROOT / path])
    ]
    mutants = []
    for file in files:
        source = file.read_text()
        finder = MutantFinder(str(file.relative_to(ROOT)), source)
        finder.visit(ast.parse(source))
        mutants += finder.mutants
    return mutants


@dataclass(frozen=True)
class Record:
    """Line coverage and duration of each test, from one run of the tests.

    Args:
        executed: file -> line -> tests that execute it; the set is empty for lines that are executed at import only.
        seconds: test -> duration.
    """

    executed: dict[str, dict[int, set[str]]]
    seconds: dict[str, float]

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Tests that execute the line of a mutant, quickest first.

        A line outside functions is executed at import, and any test may depend on it. For such a line, all tests are returned,
        starting with those that execute the file.
        """
        lines = self.executed.get(mutant.path, {})
        tests_of_file = set().union(*lines.values())
        if mutant.in_function:
            return sorted(lines.get(mutant.statement, tests_of_file), key=self.duration)
        return sorted(tests_of_file, key=self.duration) + sorted(self.seconds.keys() - tests_of_file, key=self.duration)

    def duration(self, test: str) -> float:
        return self.seconds.get(test, 0.0)


def record(arguments: list[str]) -> None:
    """Run the tests with coverage, and store which test executes which line, and the duration of each test."""
    folder = ROOT / RECORD
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = folder / "coveragerc"
    config.write_text(COVERAGE_CONFIG.format(source=ROOT, data=folder / "coverage"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COVERAGE_RCFILE": str(config)}
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-p", "scripts.mutate"]
    coverage = ["--cov", f"--cov-config={config}", "--cov-context=test", "--cov-report=term", "--cov-branch"]
    subprocess.run(
        [*command, *coverage, f"--junit-xml={folder / 'tests.xml'}", *arguments], cwd=ROOT, env=environment, check=False
    )
    seconds = {}
    for case in ElementTree.parse(folder / "tests.xml").iter("testcase"):
        module, name = case.get("classname").replace(".", "/") + ".py", case.get("name")
        seconds[f"{module}::{name}"] = float(case.get("time"))
    (folder / "seconds.json").write_text(json.dumps(seconds))


def pytest_runtest_protocol(item, nextitem) -> None:
    """pytest hook, active in ``record``: assign the lines executed by the subprocesses of a test to that test."""
    from coverage import Coverage

    if (coverage := Coverage.current()) is not None:
        coverage.config.context = item.nodeid
        os.environ["COVERAGE_PROCESS_CONFIG"] = coverage.config.serialize()


def read_record() -> Record:
    from coverage import CoverageData

    folder = ROOT / RECORD
    data = CoverageData(basename=str(folder / "coverage"))
    data.read()
    executed = {}
    for file in data.measured_files():  # paths relative to the repository root
        lines = {}
        for line, contexts in data.contexts_by_lineno(file).items():
            # A context has the form TEST or TEST|PHASE, such as "tests/x.py::test_y|run".
            tests = {part for context in contexts for part in context.split("|") if "::" in part}
            lines[line] = tests
        executed[file] = lines
    return Record(executed, json.loads((folder / "seconds.json").read_text()))


def collect_tests() -> set[str]:
    """Node ids of the current tests; tests may have been added or removed since ``record``."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-m", ""]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {line for line in listed.splitlines() if "::" in line}


def run_tests(mutant: Mutant, tests: Sequence[str], seconds: Mapping[str, float]) -> str:
    """Run tests on a mutant. Returns its outcome: killed, survived, or not covered if there are no tests."""
    if not tests:
        return "not covered"
    with tempfile.TemporaryDirectory(prefix="mutant") as folder:
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for file in tracked.splitlines():
            if (ROOT / file).is_file():
                target = Path(folder) / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, target)
        mutated_file = Path(folder) / mutant.path
        mutated_file.write_text(mutant.apply(mutated_file.read_text()))
        # Two runs of pytest, so that quick tests run first: within one run, pytest may reorder the tests.
        quick = [test for test in tests if seconds.get(test, 0.0) < QUICK]
        slow = [test for test in tests if seconds.get(test, 0.0) >= QUICK]
        passed = all(
            _tests_pass(part, folder, timeout=60 + 5 * sum(seconds.get(test, 0.0) for test in part))
            for part in (quick, slow)
            if part
        )
    return "survived" if passed else "killed"


def _tests_pass(tests: Sequence[str], folder: str, *, timeout: float) -> bool:
    """Whether tests pass in a copy of the project. A run that takes longer than ``timeout`` seconds counts as failed."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "--durations=0", f"--basetemp={folder}/tmp"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(timeout) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def sample(paths: list[str], number: int, seed: int, budget: float) -> None:
    recorded, mutants, current_tests = read_record(), find_mutants(paths), collect_tests()
    chosen = random.Random(seed).sample(mutants, min(number, len(mutants)))

    def run_mutant(mutant: Mutant) -> tuple[Mutant, str]:
        tests, total = [], 0.0
        for test in recorded.tests_of(mutant):  # quickest first, up to the budget
            if test not in current_tests:
                continue
            total += recorded.seconds.get(test, 0.0)
            if total > budget and tests:
                break
            tests.append(test)
        outcome = run_tests(mutant, tests, recorded.seconds)
        print(f"{outcome:12} {mutant} ({len(tests)} tests)", flush=True)
        return mutant, outcome

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run_mutant, chosen))
    survivors = [mutant for mutant, outcome in results if outcome != "killed"]
    print(f"\nkilled {len(results) - len(survivors)} of {len(results)} mutants, drawn from {len(mutants)} with seed {seed}")
    for mutant in survivors:
        print(mutant)
    (ROOT / RECORD / "survivors.json").write_text(json.dumps([asdict(mutant) for mutant in survivors], indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    modes.add_parser("record", help="run the tests once with coverage; further arguments are passed to pytest")
    sampling = modes.add_parser("sample", help="draw mutants and run the tests on them")
    sampling.add_argument("paths", nargs="*", default=list(PACKAGES), help="files or directories; default: all code")
    sampling.add_argument("--number", type=int, default=60, help="number of mutants")
    sampling.add_argument("--seed", type=int, default=0)
    sampling.add_argument(
        "--budget", type=float, default=120, help="maximum total seconds of tests per mutant; faster tests are chosen first"
    )
    args, rest = parser.parse_known_args()
    if args.mode == "record":
        record(rest)
    elif rest:
        parser.error(f"unknown argument {rest[0]}")
    else:
        sample(args.paths, args.number, args.seed, args.budget)


if __name__ == "__main__":
    main()
