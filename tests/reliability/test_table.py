"""Every test in the table of docs/reliability.md exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ROWS = re.findall(
    r"^\| ([A-Z]\d[^|]*) \|.*\[`(\w+)`\]\(\.\./(\S+)\) \|$", (ROOT / "docs/reliability.md").read_text(), re.MULTILINE
)
pytestmark = pytest.mark.reliability


def test_rows_of_the_table_are_parsed():
    assert len(ROWS) > 45


@pytest.mark.parametrize(("row_id", "name", "file"), ROWS)
def test_every_guarantee_refers_to_an_existing_test(row_id, name, file):
    assert f"def {name}(" in (ROOT / file).read_text(), row_id
