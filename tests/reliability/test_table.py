"""The table of docs/reliability.md names tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ROWS = re.findall(
    r"^\| ([A-Z]\d[^|]*) \|.*\[`(\w+)`\]\(\.\./(\S+)\) \|$", (ROOT / "docs/reliability.md").read_text(), re.MULTILINE
)
pytestmark = pytest.mark.reliability


def test_the_table_is_read():
    assert len(ROWS) > 45


@pytest.mark.parametrize(("promise", "name", "file"), ROWS)
def test_every_promise_has_its_test(promise, name, file):
    assert f"def {name}(" in (ROOT / file).read_text(), promise
