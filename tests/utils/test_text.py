"""Text from outside in logs, CSV and Markdown."""

import logging
import sys

import pytest

from utils.log import setup_logging
from utils.text import csv_cell, markdown, markdown_code, markdown_table, printable

HOSTILE = [
    "a\n[2026-01-01 00:00:00] WARNING forged",
    "a\r[2026-01-01 00:00:00] forged",
    "\x1b[2K\x1b]0;title\x07\x08\x7f\x9b",
    "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg",
    "\u202egnp.exe\u2066\u200b\ufeff",
    "\udc80 \ud800",
    "\x00",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_message_can_forge_a_log_line_or_control_the_terminal(text, tmp_path, capfd):
    setup_logging(0, tmp_path)
    logger = logging.getLogger("test")
    logger.info("reading %s", text)
    logger.warning("%s", text)
    try:
        raise RuntimeError(text)
    except RuntimeError:
        logger.exception("failed: %s", text)
    for handler in logging.getLogger().handlers:
        handler.flush()
    console, file = capfd.readouterr().out, (tmp_path / "log_rank0.txt").read_text()
    for output in (console, file):
        lines = output.split("\n")
        assert sum(line.startswith("[") for line in lines) == 3
        assert all(line.startswith(("[", "  ")) or not line for line in lines)
    colours = console.replace("\x1b[32m", "").replace("\x1b[33m", "").replace("\x1b[31m", "").replace("\x1b[0m", "")
    assert all(character.isprintable() for character in (colours + file).replace("\n", ""))
    assert "a" not in text or "reading a" in file


def test_line_breaks_of_the_projects_own_messages_are_kept_and_indented(tmp_path):
    setup_logging(0, tmp_path)
    logging.getLogger("test").info("config:\n%s", "AMP: false\nAUG:\n  HFLIP: 0.5\n\té")
    for handler in logging.getLogger().handlers:
        handler.flush()
    text = (tmp_path / "log_rank0.txt").read_text()
    assert text.endswith(" INFO config:\n  AMP: false\n  AUG:\n    HFLIP: 0.5\n  \té\n")


def test_printable_text_is_unchanged_and_keeps_no_secret():
    assert printable("été 日本 🙂 'x' \\n") == "été 日本 🙂 'x' \\n"
    assert printable(ValueError("GET https://u:p@h/x?k=S failed")) == "GET https://h/x failed"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("=1+1", "'=1+1"),
        ("+cmd|x", "'+cmd|x"),
        ("-x", "'-x"),
        ("@sum(a)", "'@sum(a)"),
        ("\t=1", r"\t=1"),
        ("a\nb\x1b[2J\x9b\u202e", r"a\nb\x1b[2J\x9b\u202e"),
        ("caf\udce9 \xa0é日", "caf\udce9 \xa0é日"),  # a name that is not UTF-8 keeps its bytes
        ("-1.5", "-1.5"),
        ("+3", "+3"),
        ("cat", "cat"),
        ("a=b", "a=b"),
        (-1.5, -1.5),
        ("", ""),
    ],
)
def test_a_csv_cell_cannot_be_executed_as_a_formula(value, expected):
    assert csv_cell(value) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<script>alert(1)</script>", r"\<script\>alert\(1\)\</script\>"),
        ("a_b*c`d`|e", r"a\_b\*c\`d\`\|e"),
        ("# x\n- y", r"\# x\\n\- y"),
        ("1. x", r"1\. x"),
        ("![i](javascript:x) &lt;", r"\!\[i\]\(javascript:x\) \&lt;"),
        ("small dog, été", "small dog, été"),
    ],
)
def test_markdown_shows_the_characters_of_a_name(text, expected):
    assert markdown(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("a", "`a`"), ("a`b", "`` a`b ``"), ("a``", "``` a`` ```"), ("a\nb", r"`a\nb`")]
)
def test_markdown_code_spans_cannot_be_closed_by_their_content(text, expected):
    assert markdown_code(text) == expected


def test_the_module_does_not_import_torch():
    """main.py reports usage errors with it before torch is imported."""
    import subprocess

    code = "import sys, utils.text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_vertical_lines_in_the_cells_of_a_table_do_not_end_them():
    table = markdown_table([markdown_code("a|b"), "c"], [[markdown("d|e"), 1]])
    assert table.splitlines() == [r"| `a\|b` | c |", "|---|---|", r"| d\|e | 1 |"]
