"""Preempted jobs and elastic restarts with ``scripts/slurm.sh`` and torchrun (rows S5, S6 and U1 of docs/reliability.md)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch import ROOT, free_port, torchrun, wait_for
from tests.runs import assert_equal, newest_update, read_state, toy_arguments

pytestmark = pytest.mark.reliability

# Fake ``srun``: start the command that follows the options as two ranks. Once there is a new checkpoint, send SIGUSR1 to both
# ranks, unless the environment variable PREEMPT is "no".
SRUN = f"""#!{sys.executable}
import os, pathlib, signal, subprocess, sys, time

command = sys.argv[next(i for i, word in enumerate(sys.argv) if i and not word.startswith("--")):]
folder = pathlib.Path(os.environ["RUN_FOLDER"])
newest_update = lambda: max([int(path.stem[11:]) for path in folder.glob("checkpoint_*.pth")], default=0)
start, tasks = newest_update(), []
for rank in range(2):
    variables = {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}}
    tasks.append(subprocess.Popen(command, env=os.environ | variables))
preempted = os.environ["PREEMPT"] == "no"
while any(task.poll() is None for task in tasks):
    if not preempted and newest_update() > start:
        for task in tasks:
            task.send_signal(signal.SIGUSR1)
        preempted = True
    time.sleep(0.005)
sys.exit(max(task.returncode for task in tasks))
"""
# Fake ``scontrol``: print the address of the only node, and append the ids of requeued jobs to the file $REQUEUED.
SCONTROL = """#!/usr/bin/env bash
case "$1" in
  show) echo 127.0.0.1 ;;
  requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize(
    "preemptions", [pytest.param(1, id="1 preemption"), pytest.param(5, id="5 preemptions", marks=pytest.mark.slow)]
)
def test_s5_preempted_slurm_job_is_requeued_and_equals_an_uninterrupted_run(
    preemptions, uninterrupted, toy_config, toy_data, tmp_path
):
    """Run ``scripts/slurm.sh`` with a fake ``scontrol`` and a fake ``srun``.

    After a new checkpoint, the fake ``srun`` sends SIGUSR1 to the processes, as SLURM does before a preemption.
    """
    expected = uninterrupted(2)
    programs, requeued = tmp_path / "bin", tmp_path / "requeued"
    programs.mkdir()
    write_program(programs / "srun", SRUN)
    write_program(programs / "scontrol", SCONTROL)
    write_program(programs / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "SAVE_STEPS", 2, "DATA.BATCH_SIZE", 4)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node0",
        "SLURM_JOB_ID": "7",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "RUN_FOLDER": str(tmp_path / "toy/default"),
        "REQUEUED": str(requeued),
    }
    for number in range(preemptions + 1):
        last = number == preemptions
        job = subprocess.run(
            ["bash", ROOT / "scripts/slurm.sh", *map(str, arguments)],
            cwd=ROOT,
            env=environment | {"PREEMPT": "no" if last else "yes", "MASTER_PORT": str(free_port())},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert job.returncode == (0 if last else 75), job.stdout + job.stderr
    assert requeued.read_text().split() == ["7"] * preemptions
    assert_equal(read_state(tmp_path / "toy/default"), read_state(expected))


# --- torchrun


def find_workers(output: Path, **variables: str) -> list[int]:
    """Process ids of the ranks whose command line contains ``output`` and whose environment contains ``variables``."""
    process_ids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            environment = (process / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        required = [f"{name}={value}".encode() for name, value in variables.items()]
        if (
            str(output).encode() in command
            and b"RANK=" in b"".join(environment)
            and all(entry in environment for entry in required)
        ):
            process_ids.append(int(process.name))
    return process_ids


FAILING_ONCE = """
import os
import engine.trainer
from main import main

def train_step(*arguments, original=engine.trainer.train_step, calls=[], **options):
    calls.append(None)
    if len(calls) == 5:
        raise KeyError("injected")
    return original(*arguments, **options)

if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
    engine.trainer.train_step = train_step
main()
"""


@pytest.mark.parametrize("kills", [pytest.param(1, id="1 kill"), pytest.param(3, id="3 kills", marks=pytest.mark.slow)])
def test_s6_torchrun_restarts_a_job_after_an_unexpected_error_and_after_kills(
    kills, uninterrupted, toy_config, toy_data, tmp_path
):
    """Rank 1 raises a KeyError in its first start, and is then killed ``kills`` times. Loader workers exist."""
    expected, folder, log = uninterrupted(2), tmp_path / "toy/default", tmp_path / "log"
    program = tmp_path / "failing_once.py"
    program.write_text(FAILING_ONCE)
    options = ("SAVE_STEPS", 2, "DATA.BATCH_SIZE", 4, "DATA.NUM_WORKERS", 2, "COLLECTIVE_TIMEOUT", 10)
    arguments = toy_arguments(toy_config, toy_data, tmp_path, *options)
    job = torchrun(arguments, log, "--standalone", "--nproc_per_node=2", "--max-restarts=4", program=program)
    try:
        wait_for(lambda: find_workers(tmp_path, RANK="1", TORCHELASTIC_RESTART_COUNT="1"), job, log)
        for number in range(1, kills + 1):
            start = newest_update(folder)
            wait_for(lambda start=start: newest_update(folder) > start, job, log)
            worker = min(find_workers(tmp_path, RANK="1", TORCHELASTIC_RESTART_COUNT=str(number)))  # the others are its workers
            os.kill(worker, signal.SIGKILL)
        assert job.wait(300) == 0, log.read_text()
    finally:
        for process in [job.pid, *find_workers(tmp_path)]:
            if job.poll() is None:
                os.kill(process, signal.SIGKILL)
    assert "KeyError: 'injected'" in log.read_text()
    assert log.read_text().count("resumed after update") == kills + 1
    assert_equal(read_state(folder), read_state(expected))


@pytest.mark.slow
def test_s6_job_on_two_nodes_resumes_on_the_remaining_node_after_one_fails(toy_config, toy_data, tmp_path):
    """Two torchrun agents simulate two nodes. One agent is killed with its rank; the job resumes under the other agent."""
    folder, logs = tmp_path / "toy/default", [tmp_path / "log0", tmp_path / "log1"]
    options = ["SAVE_STEPS", 2, "DATA.BATCH_SIZE", 4, "DATA.GLOBAL_BATCH_SIZE", 8, "COLLECTIVE_TIMEOUT", 10]
    arguments = toy_arguments(toy_config, toy_data, tmp_path, *options)
    endpoint = f"127.0.0.1:{free_port()}"
    agents = []
    for number, log in enumerate(logs):
        rendezvous = ("--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", "--rdzv_id=1")
        rendezvous += (f"--rdzv_conf=is_host={number == 0},last_call_timeout=2,keep_alive_interval=1",)
        agents.append(torchrun(arguments, log, "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", *rendezvous))
        if number == 0:
            time.sleep(1)  # the first agent hosts the rendezvous store, so it must start first
    try:
        wait_for(lambda: newest_update(folder) > 0, agents[0], logs[0])
        assert len(find_workers(tmp_path, WORLD_SIZE="2")) == 2
        os.killpg(agents[1].pid, signal.SIGKILL)
        for worker in find_workers(tmp_path, WORLD_SIZE="2"):
            # After the command name in parentheses, the second field is the parent's process id.
            parent = (Path("/proc") / str(worker) / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if int(parent) != agents[0].pid:
                os.kill(worker, signal.SIGKILL)
        assert agents[0].wait(180) == 0, logs[0].read_text()
    finally:
        for process in [agent.pid for agent in agents if agent.poll() is None] + find_workers(tmp_path):
            os.kill(process, signal.SIGKILL)
    text = "".join(log.read_text() for log in logs)
    assert "resumed after update" in text
    assert newest_update(folder) == 36


FAILING_MAIN = """
import os
import engine.trainer
from main import main

def fail(*arguments, **options):
    raise ValueError("injected error in rank 1")

if os.environ["RANK"] == "1":
    engine.trainer.train_step = fail
main()
"""


def test_u1_traceback_of_rank_1_is_printed_on_the_console_of_torchrun(toy_config, toy_data, tmp_path):
    program, log = tmp_path / "failing_main.py", tmp_path / "log"
    program.write_text(FAILING_MAIN)
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "DATA.BATCH_SIZE", 4, "DATA.NUM_WORKERS", 2)
    job = torchrun(arguments, log, "--standalone", "--nproc_per_node=2", program=program)
    assert job.wait(120) == 1
    text = log.read_text()
    assert "Traceback (most recent call last)" in text
    assert text.count("ValueError: injected error in rank 1") >= 2  # printed by the process, and in the report of torchrun
