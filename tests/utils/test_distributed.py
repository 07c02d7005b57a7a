"""Start-up of processes, propagation of errors between processes, and the check of the GPU driver."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.launch import run_in_processes
from tests.runs import toy_arguments
from utils.arguments import is_reporting_process
from utils.distributed import (
    LostRankError,
    MissingDeviceError,
    OtherRankError,
    agree_on_launch_id,
    check_driver,
    on_all,
    on_main,
    setup,
    sum_over_processes,
)

ROOT = Path(__file__).parent.parent.parent


def join_and_sum(rank: int, port: int, delay: float, restart: int) -> None:
    """Join the process group as under torchrun, and exit with status 0 if the sum over both processes is correct.

    As under torchrun, another process hosts the store, which outlives this process.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(restart)}
    time.sleep(delay)
    setup(20)
    total = sum_over_processes(torch.tensor(float(rank + 1)))
    os._exit(0 if total == 3 else 1)


@pytest.mark.parametrize("late_rank", [0, 1])
def test_a_restart_ignores_addresses_that_the_previous_start_left_in_the_store(late_rank):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    for restart in range(3):
        delays = [0.5 * (rank == late_rank) for rank in range(2)]
        processes = [context.Process(target=join_and_sum, args=(rank, store.port, delays[rank], restart)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]


def test_ranks_that_do_not_start_are_named_in_the_error():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    with pytest.raises(LostRankError, match=r"rank\(s\) 1, 2 did not start within COLLECTIVE_TIMEOUT=0\.1 s"):
        agree_on_launch_id(store, 0, 3, timeout_seconds=0.1)
    with pytest.raises(LostRankError, match="did not start within"):
        agree_on_launch_id(store, 1, 3, timeout_seconds=0.1)


def test_world_size_and_local_rank_variables_are_ignored_without_rank(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    world = setup()
    assert (world.rank, world.local_rank, world.size) == (0, 0, 1)
    assert is_reporting_process()


def fail_in_rank_one(world) -> None:
    def task() -> int:
        if world.rank == 1:
            raise ValueError("injected error in rank 1")
        return world.rank

    with pytest.raises(ValueError if world.rank == 1 else OtherRankError):
        on_all(world, task)
    assert on_all(world, lambda: world.rank) == world.rank


def assert_broadcast_groups(world) -> None:
    groups, broadcast = [], dist.broadcast_object_list

    def record(values, src, group):
        groups.append(group)
        broadcast(values, src=src, group=group)

    dist.broadcast_object_list = record
    assert on_main(world, lambda: "scan", long_timeout=True) == "scan"
    assert on_main(world, lambda: "save") == "save"
    assert groups == [world.long_timeout_group, None]


def test_on_main_uses_the_long_timeout_group_only_for_tasks_with_a_long_timeout():
    run_in_processes(assert_broadcast_groups, processes=2)


def test_a_task_that_fails_in_one_process_fails_in_all_processes():
    run_in_processes(fail_in_rank_one, processes=2)


def test_a_signal_while_packages_are_imported_stops_training_before_its_first_update(toy_config, toy_data, tmp_path):
    arguments = toy_arguments(toy_config, toy_data, tmp_path)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([sys.executable, "main.py", *map(str, arguments)], cwd=ROOT, stdout=log, stderr=log)
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None, "main.py ended before it imported torch"
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(120) == 75
    assert "stopped before the first update" in (tmp_path / "log").read_text()


def test_a_gpu_that_torch_cannot_use_is_rejected_unless_it_is_hidden(monkeypatch, tmp_path):
    """Without the check, every process would silently train on the CPU if the driver were too old."""
    device_file = tmp_path / "nvidia1"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check_driver(tmp_path)
    device_file.touch()
    with pytest.raises(MissingDeviceError, match="install a torch build for the CUDA version that the driver supports"):
        check_driver(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(MissingDeviceError, match=r"cannot use it \(CUDA_VISIBLE_DEVICES=7\)\. Check nvidia-smi"):
        check_driver(tmp_path)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        check_driver(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", None)  # a torch build for the CPU
    check_driver(tmp_path)
