"""Number and shared memory of the loader workers."""

import time
from types import SimpleNamespace

import pytest
import torch

from data.build import build_datasets, build_train_loader
from data.loader import DeviceLoader
from data.workers import FINISHED, WatchedDataset, warn_about_shared_memory
from engine.loading_speed import LoadingCheck, describe_loading
from utils.config.loading import load_config
from utils.distributed import World


def test_a_warning_is_logged_if_the_batches_of_the_workers_do_not_fit_into_shared_memory(monkeypatch, caplog):
    free = SimpleNamespace(f_bavail=16_384, f_frsize=4096)  # 64 MiB, as in a container of Docker
    monkeypatch.setattr("os.statvfs", lambda path: {"/dev/shm": free}[path])
    warn_about_shared_memory(64 * 2**20)
    assert not caplog.text
    warn_about_shared_memory(7 * 2 * 128 * 3 * 224 * 224)
    assert "/dev/shm has 64 MiB free, but the batches of the loader workers of this process may need 258 MiB" in caplog.text


def test_the_workers_prepare_the_next_epoch_before_it_is_read_and_its_batches_are_the_same(toy_config, toy_data):
    options = ["DATA.DATA_PATH", str(toy_data), "DATA.BATCH_SIZE", 4, "AUG.REPROB", 1.0, "DATA.NUM_WORKERS"]
    placement = {"rank": 0, "world_size": 1, "device": torch.device("cpu")}
    workers, without = (
        build_train_loader(cfg, build_datasets(cfg, training=True).train, **placement)
        for cfg in (load_config(toy_config, [*options, number]) for number in (1, 0))
    )
    for epoch, first_update, started in ((0, 1, None), (1, 0, 1), (2, 2, 2), (3, 0, 3)):
        if started is not None:
            finished = int(workers.dataset.progress[0, FINISHED])
            workers.start(started)
            deadline = time.monotonic() + 60
            while workers.dataset.progress[0, FINISHED] < finished + 2 * 4:  # two batches
                assert time.monotonic() < deadline
                time.sleep(0.01)
        for loader in (workers, without):
            loader.set_position(epoch, first_update)
        for one, other in zip(workers, without, strict=True):
            assert torch.equal(one.images, other.images)
            assert (one.keys == other.keys).all()


def loader_with(milliseconds: float) -> DeviceLoader:
    """A loader whose four workers have taken this time per image."""
    dataset = WatchedDataset([], 4)
    dataset.progress[1] = torch.tensor([30, -1, int(30e6 * milliseconds)])
    dataset.progress[3] = torch.tensor([10, -1, int(10e6 * milliseconds)])
    return DeviceLoader(SimpleNamespace(dataset=dataset, num_workers=4), None, torch.device("cpu"))


@pytest.mark.parametrize(
    ("milliseconds", "num_cores", "expected"),
    [
        (1.0, 8, "about 3 loader worker(s) per process (now 4, with 8 CPU core(s) per process)"),
        (3.5, 8, "about 9 loader worker(s) per process (now 4, with 8 CPU core(s) per process); make the images smaller"),
        (
            2.5,
            8,
            "about 7 loader worker(s) per process (now 4, with 8 CPU core(s) per process); set --opts DATA.NUM_WORKERS 7",
        ),
    ],
)
def test_the_number_of_needed_loader_workers_follows_from_the_measured_times(milliseconds, num_cores, expected):
    """A step of 50 ms with 128 images needs 2.56 workers per millisecond that an image takes."""
    text = describe_loading(loader_with(milliseconds), num_images=128, update_seconds=0.05, num_cores=num_cores)
    assert text.startswith(f"loading an image takes a loader worker {milliseconds} ms")
    assert expected in text


@pytest.mark.parametrize(
    ("device", "local_rank", "data_wait", "warned"),
    [("cuda", 0, 0.5, True), ("cuda", 1, 0.5, False), ("cuda", 0, 0.1, False), ("cpu", 0, 0.5, False)],
)
def test_a_gpu_that_waits_for_images_is_reported_once_per_machine_but_not_for_the_first_interval(
    device, local_rank, data_wait, warned, caplog
):
    world = World(local_rank, local_rank, 4, torch.device(device), num_cores=8)
    check = LoadingCheck(loader_with(3.5), world, images_per_update=4 * 128)
    check.check(0.9, 1.0)
    assert not caplog.text
    for _ in range(3):
        check.check(data_wait, 0.1)  # 0.05 s without the wait of 50 %
    assert len(caplog.records) == warned
    if warned:
        assert "the GPU waits for images in 50 % of the time: loading an image takes" in caplog.text
        assert "about 9 loader worker(s)" in caplog.text
