"""How many loader workers a training step needs, by measured times."""

import logging

from data.loader import DeviceLoader
from utils.distributed import World

logger = logging.getLogger(__name__)

MAX_DATA_WAIT = 0.2  # fraction of the time in which updates may wait for images without a warning


def describe_loading(loader: DeviceLoader, *, num_images: int, update_seconds: float, num_cores: int) -> str:
    """The number of loader workers that keep up with the training step, and the remedy if there are fewer.

    Args:
        num_images: images of this process in an update.
        update_seconds: duration of an update that does not wait for images.
        num_cores: CPU cores for this process.
    """
    needed, num_workers = loader.count_needed_workers(num_images, update_seconds), loader.loader.num_workers
    needs = (
        f"loading an image takes a loader worker {1000 * loader.dataset.seconds_per_image:.1f} ms, so the training step needs "
        f"about {needed} loader worker(s) per process (now {num_workers}, with {num_cores} CPU core(s) per process)"
    )
    if needed <= num_workers:
        return needs
    if needed <= num_cores:
        return f"{needs}; set --opts DATA.NUM_WORKERS {needed}"
    return (
        f"{needs}; make the images smaller (scripts/pack_dataset.py --short-side 256), read them from a faster disk, or give "
        "each process more cores"
    )


class LoadingCheck:
    """Warns once per machine if its first GPU waits for images. The processes of a machine share its disk and its cores.

    On a CPU, there is no warning, since more loader workers would take cores from the training step.

    Args:
        images_per_update: over all processes.
    """

    def __init__(self, loader: DeviceLoader, world: World, *, images_per_update: int):
        self.loader = loader
        self.world = world
        self.images_per_update = images_per_update
        self.intervals = 0
        self.warned = False

    def check(self, data_wait: float, update_seconds: float) -> None:
        """Check an interval of the log, except for the first one, in which the loader workers start.

        Args:
            data_wait: fraction of the time in which updates waited for images.
            update_seconds: duration of an update, including this time.
        """
        self.intervals += 1
        if self.warned or self.intervals == 1 or data_wait <= MAX_DATA_WAIT:
            return
        if self.world.local_rank > 0 or self.world.device.type == "cpu":
            return
        self.warned = True
        logger.warning(
            "the GPU waits for images in %.0f %% of the time: %s",
            100 * data_wait,
            describe_loading(
                self.loader,
                num_images=self.images_per_update // self.world.size,
                update_seconds=update_seconds * (1 - data_wait),
                num_cores=self.world.num_cores,
            ),
        )
