"""Rank of this process and number of processes, from the environment variables of the launcher. Does not import torch."""

import os
from typing import NamedTuple

from utils.errors import ConfigError

# Numbers of tasks in the variables of srun, Open MPI, MPICH and Intel MPI, MVAPICH, and jsrun. These launchers do not set RANK.
TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE")
REMEDY = "start the processes with torchrun, or with scripts/slurm.sh under SLURM"
OR_SINGLE = f"{REMEDY}, or unset RANK to run a single process"


class Launch(NamedTuple):
    """Position of this process among the processes of its launch.

    Attributes:
        launched: whether a launcher started this process; if not, it is the only process.
    """

    launched: bool
    rank: int
    local_rank: int
    size: int


def read_launch() -> Launch:
    """Read and check the variables that torchrun and scripts/slurm.sh set. Without RANK, this process is the only one.

    Raises:
        ConfigError: a variable is missing or inconsistent, or another launcher started several processes without RANK.
    """
    if "RANK" not in os.environ:
        for name in TASK_COUNTS:
            if os.environ.get(name, "").isdecimal() and int(os.environ[name]) > 1:
                raise ConfigError(
                    f"{name}={os.environ[name]}: this launcher started several tasks but did not set RANK, so each of them "
                    f"would run the whole job alone; {REMEDY}. To run a single process here, unset {name}"
                )
        return Launch(False, 0, 0, 1)  # another program may have set WORLD_SIZE or LOCAL_RANK
    rank, size = _read("RANK"), _read("WORLD_SIZE", minimum=1)
    local_size = _read("LOCAL_WORLD_SIZE", minimum=1) if "LOCAL_WORLD_SIZE" in os.environ else size
    local_rank = _read("LOCAL_RANK") if size > 1 or "LOCAL_RANK" in os.environ else 0
    for name, value, limit_name, limit in (
        ("RANK", rank, "WORLD_SIZE", size),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "WORLD_SIZE", local_size),
    ):
        if value >= limit:
            raise ConfigError(f"{name}={value}: must be less than {limit_name}={limit}; {REMEDY}")
    if not os.environ.get("MASTER_ADDR"):
        raise ConfigError(f"MASTER_ADDR is not set, but RANK={rank} is; {OR_SINGLE}")
    _read("MASTER_PORT", minimum=1)
    return Launch(True, rank, local_rank, size)


def is_reporting_process() -> bool:
    """Whether this process prints usage errors; one process per machine does."""
    return "RANK" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


def _read(name: str, *, minimum: int = 0) -> int:
    value = os.environ.get(name)
    if value is None:
        raise ConfigError(f"{name} is not set, but RANK={os.environ['RANK']} is; {OR_SINGLE}")
    if not (value.isascii() and value.isdecimal()) or int(value) < minimum:
        raise ConfigError(f"{name}={value!r}: must be a whole number of at least {minimum}; {OR_SINGLE}")
    return int(value)
