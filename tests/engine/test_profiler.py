"""The profile of some updates: its table agrees with the trace file, read without torch."""

import collections
import gzip
import json
import logging
import re

import torch

from engine.profiler import profile_updates
from tests.launch import run_main
from tests.runs import toy_arguments
from utils.distributed import World


def read_own_times(path) -> dict[str, float]:
    """Microseconds of each operation of a trace, without those of the operations that it calls."""
    with gzip.open(path) as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("cat") == "cpu_op"]
    times = collections.Counter()
    for thread in {event["tid"] for event in events}:
        open_events = []
        for event in sorted((e for e in events if e["tid"] == thread), key=lambda e: (e["ts"], -e["dur"])):
            while open_events and event["ts"] >= open_events[-1]["ts"] + open_events[-1]["dur"]:
                open_events.pop()
            times[event["name"]] += event["dur"]
            if open_events:
                times[open_events[-1]["name"]] -= event["dur"]
            open_events.append(event)
    return times


def read_table(text: str) -> dict[str, float]:
    """Milliseconds per update by operation, from the lines of the log."""
    return {name: float(ms) for ms, name in re.findall(r"^ +([\d.]+) +[\d.]+% +\d+  (\S.*)$", text, flags=re.MULTILINE)}


def test_the_table_lists_the_ten_longest_operations_of_the_trace_file(tmp_path, caplog):
    """A product of large matrices takes longer than the element-wise operations."""
    one, other = torch.randn(1024, 1024), torch.randn(1024, 1024, requires_grad=True)

    def update():
        (one @ other).relu().square().mean().backward()
        other.grad = None

    path = tmp_path / "model.pt.trace.json.gz"
    with caplog.at_level(logging.INFO):
        profile_updates(update, World(0, 0, 1, torch.device("cpu")), path)
    times, table = read_own_times(path), read_table(caplog.text)
    assert len(table) == 10
    assert next(iter(table)) == "aten::mm"
    longest = sorted(times, key=times.get, reverse=True)
    assert set(table) <= set(longest[:14])  # the last ones are of nearly equal length
    assert longest[0] == "aten::mm"
    for name, milliseconds in table.items():
        assert abs(milliseconds - times[name] / 3000) < 0.002 + 0.02 * milliseconds, name
    assert path.stat().st_size < 100_000


def test_a_profile_that_cannot_be_written_is_refused_before_the_data_are_read(toy_config, toy_data, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = toy_arguments(toy_config, toy_data, tmp_path / "out")
    for options, message in (
        (["--profile", tmp_path / "a"], "applies only to a dry run; add --check"),
        (["--check", "--profile", tmp_path / "file"], "cannot be written to (File exists); choose another directory"),
        (["--check", "--profile", tmp_path / "file/a"], "cannot be written to (Not a directory); choose another directory"),
    ):
        outcome = run_main([*arguments, *options], tmp_path / "log")
        assert outcome.exit_codes == [2], outcome.output
        assert message in outcome.output
        assert "loader workers" not in outcome.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "log"]
