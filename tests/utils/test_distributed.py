"""Start-up of processes, propagation of errors between processes, and the check of the GPU driver."""

import dataclasses
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import utils.distributed
from data.files import DataError
from tests import launch
from tests.launch import free_port, run_in_processes
from tests.runs import toy_arguments
from utils.collective_watch import CollectiveWatch
from utils.devices import (
    MissingDeviceError,
    check_device_is_not_shared,
    check_driver,
    choose_device,
    warn_about_unused_devices,
)
from utils.distributed import (
    LostRankError,
    agree_on_launch_id,
    choose_interface,
    cleanup,
    find_interface,
    is_lost_connection,
    on_all,
    on_main,
    setup,
    sum_over_processes,
)
from utils.errors import ConfigError, OtherRankError, exit_status
from utils.launcher import TASK_COUNTS, is_reporting_process, read_launch

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


def fail_in_one_rank(world) -> None:
    """The process that fails raises its own error; the other one ends with the same exit status."""
    for error, status in ((ValueError("injected"), 1), (SystemExit("injected"), 1), (DataError("injected"), 2)):

        def task(failing_rank: int, error: BaseException = error) -> int:
            if world.rank == failing_rank:
                raise error
            return world.rank

        for run, failing_rank in ((on_all, 1), (on_main, 0)):
            with pytest.raises(type(error) if world.rank == failing_rank else OtherRankError) as raised:
                run(world, partial(task, failing_rank))
            assert exit_status(raised.value) == status
    assert on_all(world, lambda: world.rank) == world.rank


def wait_longer_than_the_timeout(world) -> None:
    world = dataclasses.replace(world, timeout_seconds=0.5)
    large = list(range(100_000))
    assert on_main(world, lambda: time.sleep(1) or large, long_timeout=True) == large
    assert len(dist.distributed_c10d._world.pg_map) == 1  # a group for a second backend would choose another interface
    if not world.is_main:
        with pytest.raises(dist.DistError) as raised:
            utils.distributed._wait_for_main(world, 0.5)
        assert is_lost_connection(raised.value)
    on_all(world, lambda: None)  # rank 0 hosts the store


def test_processes_wait_longer_than_the_timeout_of_collectives_only_for_tasks_with_a_long_timeout():
    run_in_processes(wait_longer_than_the_timeout, processes=2)


def test_a_process_that_waits_for_rank_0_handles_signals_and_lets_others_use_the_store():
    store = dist.TCPStore("127.0.0.1", free_port(), 1, True)
    world = utils.distributed.World(1, 1, 2, torch.device("cpu"), store=store)
    previous = signal.signal(signal.SIGALRM, lambda *_arguments: store.set("main/0", ""))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        utils.distributed._wait_for_main(world, 5)
    finally:
        signal.signal(signal.SIGALRM, previous)


def join_with_a_faked_gpu(rank: int, port: int) -> None:
    """Exit with status 0 if ``setup`` watches the collectives of a GPU, and leaves the network interface to NCCL."""
    os.environ |= launch.launch_variables(rank, 2, port) | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # one process per node
    utils.distributed.choose_device = lambda _rank: torch.device("cuda", 0)
    utils.distributed.check_device_is_not_shared = lambda *_arguments: None
    init, backends = dist.init_process_group, []

    def init_with_gloo(backend, *, device_id, **options):
        backends.append(backend)
        init("gloo", **options)

    dist.init_process_group = init_with_gloo
    world = setup(20, on_stall=lambda error, world: None)
    is_watched = utils.distributed._watch is not None
    cleanup()
    expected = ("cuda", ["nccl"], True, None)
    os._exit((world.device.type, backends, is_watched, os.environ.get("GLOO_SOCKET_IFNAME")) != expected)


def test_processes_on_gpus_use_nccl_alone_and_watch_their_collectives():
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [context.Process(target=join_with_a_faked_gpu, args=(rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


class FakeEvent:
    """A CUDA event, which ``torch.cuda.Event`` does not provide without a GPU; the GPU has reached it if ``finished``."""

    finished = False

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return self.finished


@pytest.mark.parametrize(
    ("host_continues", "gpu_continues"),
    [(True, True), (True, False), (False, False)],
    ids=["all finish", "the GPU waits", "the host waits in a kernel launch"],
)
def test_collectives_on_a_gpu_that_do_not_finish_are_reported_before_nccl_aborts_the_process(
    host_continues, gpu_continues, monkeypatch
):
    event = FakeEvent()
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    errors, started = [], time.monotonic()
    watch = CollectiveWatch(1.0, lambda error: errors.append((error, time.monotonic() - started)))
    for _ in range(2):  # the second span starts before the GPU has finished the first one
        span = watch.begin()
        if host_continues:
            watch.end(span)
    event.finished = gpu_continues
    deadline = time.monotonic() + (1.5 if gpu_continues else 60)
    while not errors and time.monotonic() < deadline:
        time.sleep(0.01)
    watch.close()
    assert bool(errors) == (not gpu_continues)
    for error, seconds in errors:
        assert is_lost_connection(error)
        assert seconds > 0.85


def test_a_task_that_fails_in_one_process_fails_in_all_processes():
    run_in_processes(fail_in_one_rank, processes=2)


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
    with pytest.raises(
        MissingDeviceError, match="This torch build has no CUDA support; install torch and torchvision for CUDA"
    ):
        check_driver(tmp_path)


# Devices, with faked GPUs.


def fake_gpus(monkeypatch, count: int) -> list[torch.device]:
    """Let torch report ``count`` GPUs; return the list of devices that are activated."""
    activated = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", activated.append)
    return activated


def test_a_process_uses_the_gpu_of_its_local_rank_or_the_only_one_it_sees(monkeypatch):
    """Under ``srun --gpus-per-task=1``, every process sees one GPU, as number 0."""
    activated = fake_gpus(monkeypatch, 8)
    assert [choose_device(rank).index for rank in range(8)] == [device.index for device in activated] == list(range(8))
    fake_gpus(monkeypatch, 1)
    assert [choose_device(rank).index for rank in range(8)] == [0] * 8
    fake_gpus(monkeypatch, 2)
    with pytest.raises(MissingDeviceError, match=r"process 2 .* has no GPU: only 2 found"):
        choose_device(2)


def test_two_processes_on_the_same_gpu_are_rejected(monkeypatch):
    """Only the processes of one launch are compared: after a restart, the same GPU is free again."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-7"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    store, device = dist.HashStore(), torch.device("cuda", 0)
    for launch_id in ("first", "restart"):
        launch = dist.PrefixStore(launch_id, store)
        check_device_is_not_shared(launch, device)
        with pytest.raises(MissingDeviceError, match=r"already uses the only GPU .* H100; lower --nproc_per_node"):
            check_device_is_not_shared(launch, device)


def test_a_single_process_on_a_machine_with_unused_gpus_gets_a_warning(monkeypatch, caplog):
    fake_gpus(monkeypatch, 8)
    warn_about_unused_devices(torch.device("cuda", 0))
    assert "this machine has 8 GPUs" in caplog.text
    assert "torchrun --nproc_per_node=gpu main.py" in caplog.text
    fake_gpus(monkeypatch, 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    warn_about_unused_devices(torch.device("cpu"))
    assert "Apple GPU (MPS) is not used" in caplog.text
    caplog.clear()
    fake_gpus(monkeypatch, 1)
    warn_about_unused_devices(torch.device("cuda", 0))
    assert not caplog.text


# Variables of launchers.

LAUNCH_VARIABLES = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def launch_variables(monkeypatch):
    """Set the variables of rank 1 of 2 processes, and remove those of other launchers."""
    for name in (*TASK_COUNTS, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in LAUNCH_VARIABLES.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            (name, value)
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
            for value in ("", "x", "-1", "1.5", "\N{ARABIC-INDIC DIGIT ONE}")
        ],
        *[(name, None) for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")],
        ("RANK", "2"),
        ("LOCAL_RANK", "2"),
        ("WORLD_SIZE", "1"),
        ("WORLD_SIZE", "0"),
        ("LOCAL_WORLD_SIZE", "1"),
        ("LOCAL_WORLD_SIZE", ""),
    ],
)
def test_inconsistent_launch_variables_are_rejected_and_named(name, value, launch_variables, monkeypatch):
    assert read_launch() == (True, 1, 1, 2)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"{name}\b.*torchrun"):
        read_launch()


@pytest.mark.parametrize("name", TASK_COUNTS)
def test_several_tasks_without_rank_are_rejected(name, launch_variables, monkeypatch):
    """Otherwise, each task would train the whole job alone. The remedies of the message are accepted."""
    monkeypatch.setenv(name, "2")
    assert read_launch() == (True, 1, 1, 2)
    monkeypatch.delenv("RANK")
    with pytest.raises(ConfigError, match=rf"{name}=2: .* start the processes with torchrun.* unset {name}"):
        read_launch()
    monkeypatch.setenv(name, "1")
    assert read_launch() == (False, 0, 0, 1)
    monkeypatch.delenv(name)
    assert read_launch() == (False, 0, 0, 1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": ""}, "RANK=''"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2"),
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
    ],
)
def test_main_rejects_launch_variables_before_torch_is_imported(variables, message, toy_config, toy_data, tmp_path):
    program = f"import sys; sys.argv = {['main.py', *map(str, toy_arguments(toy_config, toy_data, tmp_path))]!r}; import main\n"
    program += "try: main.main()\nfinally: assert 'torch' not in sys.modules"
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCH_VARIABLES}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment | variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"main.py: error: {message}")
    assert "Traceback" not in result.stderr


# Network interfaces.


def test_the_interface_of_a_host_is_the_one_from_which_packets_to_it_leave():
    assert find_interface("127.0.0.1") is None
    assert find_interface("127.0.1.1") is None
    assert find_interface("no-such-host.invalid") is None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no route to other machines")
    assert find_interface("192.0.2.1") in [name for _, name in socket.if_nameindex() if name != "lo"]


@pytest.mark.parametrize(
    ("local_size", "given", "routes", "chosen"),
    [
        ("1", None, {"node0": "eth1"}, "eth1"),  # another node
        ("1", None, {"192.0.2.1": "eth0"}, "eth0"),  # the first node, whose own name is mapped to 127.0.1.1
        ("1", None, {}, None),  # no route is known
        ("1", "ib0", {"node0": "eth1"}, "ib0"),  # set by the user
        ("2", None, {"node0": "eth1"}, None),  # all processes run on one node
    ],
)
def test_gloo_uses_the_interface_that_leads_to_the_other_nodes(
    local_size, given, routes, chosen, launch_variables, monkeypatch
):
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_size)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", given or "")
    if given is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(utils.distributed, "find_interface", routes.get)
    choose_interface(2)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen


@pytest.mark.parametrize(("message", "reason"), [("", "DistError"), ("[pair.cc:1] closed\nby peer. More", "closed by peer")])
def test_a_lost_connection_is_reported_with_any_message(message, reason, monkeypatch):
    monkeypatch.setattr(utils.distributed, "SECONDS_TO_REGISTER", 0)
    world = utils.distributed.World(0, 0, 2, torch.device("cpu"), store=dist.HashStore())
    error = str(utils.distributed.lost_rank_error(world, dist.DistError(message)))
    assert f"did not take part in start-up or evaluation within COLLECTIVE_TIMEOUT ({reason})" in error
