"""Train under random faults for a given time, and compare each finished run with an undisturbed run (without faults).

A small model is trained on handwritten digits. Each time the training command is started, one fault follows at a random time:
SIGKILL to one or all processes, a stop signal to one process, a full disk, damage to the newest checkpoint, deletion of all
checkpoints except best.pth, or a move of the output directory, which is moved back later. Before some of these faults, a second
run is started in the same directory. After some, a start with --resume of another run's checkpoint is tried, which must be
refused. After the fault, the same command is repeated. All runs, including the undisturbed one, have the same unreadable
training images (DATA.UNREADABLE skip).

After each fault, all processes must end, and the newest intact checkpoint must not be older than before, unless the fault
damaged a checkpoint. The final state (model, EMA, optimizer, scaler, counters) must be bit-equal to the undisturbed run's.

The seed determines the kinds and times of the faults. The update at which a fault occurs depends on the speed of the machine.
Linux only.
"""

import argparse
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from engine.run_contents import survey
from engine.run_directory import RunLock
from models.checkpoints.reader import read_checkpoint
from tests.launch import free_port, launch_variables
from tests.runs import find_difference, newest_update, read_state
from utils.errors import STOPPED, USAGE_ERROR, ConfigError
from utils.files import write_json
from utils.run_files import BEST, is_numbered, list_checkpoints
from utils.stop import SIGNALS

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/quickstart.yaml"
GLOBAL_BATCH_SIZE = 64
UNREADABLE_IMAGES = 3  # number of truncated training images
COLLECTIVE_TIMEOUT = 20  # seconds
OPTIONS = (
    *("DATA.GLOBAL_BATCH_SIZE", GLOBAL_BATCH_SIZE, "DATA.UNREADABLE", "skip", "TRAIN.EPOCHS", 12, "SAVE_STEPS", 5),
    *("COLLECTIVE_TIMEOUT", COLLECTIVE_TIMEOUT),
)
SECONDS_TO_END = COLLECTIVE_TIMEOUT + 40  # maximum time from a fault to the end of all processes
SHARE_OF_OTHER_RUNS = 0.2  # share of the faults after which a checkpoint of another run is tried
BYTES_OF_FULL_DISK = 20_000  # file-size limit that simulates a full disk; smaller than a checkpoint
DONE = 0  # exit status of a finished run; utils.errors has the others


class SoakError(Exception):
    """A guarantee was violated: state was lost or differs, or a process did not end. Every function below may raise it."""


def newest_intact_update(folder: Path) -> int:
    """Number of updates of the checkpoint from which a run would resume; 0 if there is none."""
    usable = survey(folder).usable
    return usable[0].num_updates if usable else 0


class Job:
    """One execution of the training command, with one process of ``main.py`` per rank.

    Args:
        batch_size: images per process and forward pass.
        log: file to which the processes append their output.
        arguments: further arguments of main.py.
    """

    def __init__(
        self,
        data: Path,
        output: Path,
        *,
        num_processes: int,
        batch_size: int,
        num_workers: int,
        log: Path,
        arguments: Sequence[object] = (),
    ):
        self.folder = output / "quickstart/default"
        self.name = output.name
        self.log = log
        port = free_port()
        command = [sys.executable, "main.py", "--cfg", CONFIG, "--data-path", data.absolute(), "--output", output.absolute()]
        command += ["--batch-size", batch_size, *arguments, "--opts", *OPTIONS, "DATA.NUM_WORKERS", num_workers]
        self.processes = []
        with open(log, "a", encoding="utf-8") as file:
            for rank in range(num_processes):
                variables = launch_variables(rank, num_processes, port) if num_processes > 1 else {}
                self.processes.append(
                    subprocess.Popen(
                        list(map(str, command)),
                        cwd=ROOT,
                        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=file,
                        start_new_session=True,
                    )
                )

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Wait for ``seconds``, or until all processes have ended or ``until()`` is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.running() and not until():
            time.sleep(0.01)

    def end(self, seconds: float) -> list[int]:
        """Wait for the exit statuses of all processes."""
        self.wait(seconds)
        if self.running():
            self.kill()
            raise SoakError(f"a process did not end within {seconds} s; see {self.log}")
        return [process.returncode for process in self.processes]

    def kill(self) -> None:
        """Send SIGKILL to all processes and their loader workers."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


# --- Faults: each function applies a fault to a running job, and returns a description of the fault


def kill_one(job: Job, rng: random.Random) -> str:
    rank = rng.randrange(len(job.processes))
    os.kill(job.processes[rank].pid, signal.SIGKILL)
    return f"SIGKILL to rank {rank}"


def kill_all(job: Job, _rng: random.Random) -> str:
    job.kill()
    return "SIGKILL to all processes"


def stop(job: Job, rng: random.Random) -> str:
    # Child processes inherit an ignored signal, such as SIGHUP under nohup.
    handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    rank, stop_signal = rng.randrange(len(job.processes)), rng.choice(handled)
    os.kill(job.processes[rank].pid, stop_signal)
    return f"{stop_signal.name} to rank {rank}"


def fill_disk(job: Job, _rng: random.Random) -> str:
    _, hard = resource.prlimit(job.processes[0].pid, resource.RLIMIT_FSIZE)
    resource.prlimit(job.processes[0].pid, resource.RLIMIT_FSIZE, (BYTES_OF_FULL_DISK, hard))
    return "disk full for rank 0"


def damage(job: Job, rng: random.Random) -> str:
    job.kill()
    newest = next((one.path for one in survey(job.folder).usable if is_numbered(one.path)), None)
    if newest is None:
        return "SIGKILL to all processes, no checkpoint to damage"
    kind, content = rng.choice(["truncated", "overwritten", "empty", "a directory"]), newest.read_bytes()
    middle = len(content) // 2
    newest.unlink()  # do not overwrite the file: best.pth may be a hard link to it, and must stay intact
    if kind == "a directory":
        newest.mkdir()
    else:
        overwritten = content[:middle] + rng.randbytes(1000) + content[middle + 1000 :]
        contents = {"truncated": content[: rng.randrange(len(content))], "overwritten": overwritten, "empty": b""}
        newest.write_bytes(contents[kind])
    return f"SIGKILL to all processes, {newest.name} is now {kind}"


def keep_only_best(job: Job, _rng: random.Random) -> str:
    job.kill()
    if not (job.folder / BEST).is_file():
        return "SIGKILL to all processes, no best.pth to keep"
    for path in list_checkpoints(job.folder):
        if path.is_dir():  # from the fault that puts a directory in the place of a checkpoint
            path.rmdir()
        else:
            path.unlink()
    return "SIGKILL to all processes, all checkpoints except best.pth deleted"


def is_locked(folder: Path) -> bool:
    """Whether a run has locked its output directory."""
    try:
        RunLock(folder).check()
    except ConfigError:
        return True
    return False


def move_directory(job: Job, _rng: random.Random) -> str:
    """Move the output directory, wait for the end of the job, and move the directory back."""
    if not is_locked(job.folder):  # a run that has not locked its directory yet would create it again, which is correct
        job.kill()
        return "SIGKILL to all processes, no directory in use to move"
    moved = job.folder.with_name("moved")
    job.folder.rename(moved)
    job.wait(SECONDS_TO_END)
    if job.folder.exists():
        raise SoakError(f"the output directory was moved, but the job created {job.folder}; see {job.log}")
    moved.rename(job.folder)
    return "output directory moved, then moved back"


FAULTS = {
    "kill one": kill_one,
    "kill all": kill_all,
    "stop": stop,
    "full disk": fill_disk,
    "damage": damage,
    "best.pth alone": keep_only_best,
    "moved directory": move_directory,
}
LOSSES = ("damage", "best.pth alone")  # faults after which the newest checkpoint may be an earlier one
SECOND_RUN, OTHER_RUN = "second run", "--resume of another run"


class Soak:
    """Training runs under faults, and the number of survived faults by kind."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.rng = random.Random(args.seed)
        self.survived: Counter = Counter()
        self.num_runs = 0
        self.jobs: list[Job] = []
        self.begin = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begin:6.1f} s] {text}", flush=True)

    def minutes(self) -> float:
        """Minutes since the start of the script."""
        return (time.monotonic() - self.begin) / 60

    def job(self, name: str, *, log: str = "", **options) -> Job:
        """Start the training command with output directory ``name``, and log file ``log``.txt (default: ``name``.txt).

        Args:
            options: arguments of ``Job``.
        """
        output = self.args.output
        options = {"num_processes": self.args.processes, "num_workers": 0} | options
        batch_size = GLOBAL_BATCH_SIZE // self.args.processes
        job = Job(output / "digits", output / name, batch_size=batch_size, log=output / f"{log or name}.txt", **options)
        self.jobs = [*(other for other in self.jobs if other.running()), job]
        return job

    def make_data(self) -> None:
        """Write handwritten digits, and truncate a few of the training images to half their bytes."""
        data = self.args.output / "digits"
        subprocess.run([sys.executable, ROOT / "scripts/make_digits.py", data], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        images = sorted((data / "train").rglob("*.png"))
        for image in self.rng.sample(images, UNREADABLE_IMAGES):
            image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])

    def train_undisturbed(self) -> dict:
        """Train without faults. Returns the final state."""
        begin = time.monotonic()
        job = self.job("undisturbed")
        statuses = job.end(seconds=3600)
        if set(statuses) != {DONE}:
            raise SoakError(f"the undisturbed run ended with exit statuses {statuses}; see {job.log}")
        self.seconds_undisturbed = time.monotonic() - begin
        self.say(f"undisturbed run: {newest_update(job.folder)} updates in {self.seconds_undisturbed:.0f} s")
        return read_state(job.folder)

    def train_disturbed(self, expected: dict) -> None:
        """Train one run to its end, with faults until --minutes have passed, and compare its final state with ``expected``."""
        self.num_runs += 1
        name = f"run{self.num_runs}"
        while True:
            job = self.job(name, num_workers=self.rng.choice([0, 0, 2]))
            statuses = self.disturb(job) if self.minutes() < self.args.minutes else job.end(20 * self.seconds_undisturbed)
            if set(statuses) == {DONE}:
                break
            if self.minutes() > self.args.minutes + 1 + 20 * self.seconds_undisturbed / 60:
                raise SoakError(f"{name} does not finish, exit statuses {statuses}; see {job.log}")
        if difference := find_difference(read_state(job.folder), expected):
            raise SoakError(f"{name}: final state differs from the undisturbed run at {difference}")
        best = read_checkpoint(job.folder / BEST)
        if best["num_updates"] != expected["best"]["num_updates"]:
            raise SoakError(f"{name}: best.pth is from update {best['num_updates']}, not {expected['best']['num_updates']}")
        self.say(f"{name}: finished, equal to the undisturbed run")
        shutil.rmtree(job.folder.parent.parent)

    def disturb(self, job: Job) -> list[int]:
        """Apply one fault to a job at a random time.

        Returns:
            The exit statuses of its processes.
        """
        update_at_start = newest_update(job.folder)
        delay = self.rng.uniform(0, self.args.longest_delay)
        kind = self.rng.choice([*FAULTS, SECOND_RUN])
        if kind == SECOND_RUN:
            return self.start_second_run(job)
        job.wait(delay)
        if not job.running():
            return job.end(0)
        update_before, has_saved = newest_intact_update(job.folder), newest_update(job.folder) > update_at_start
        fault = FAULTS[kind](job, self.rng)
        statuses = job.end(SECONDS_TO_END)
        if set(statuses) == {DONE}:  # the run finished, because the fault came after the last save
            return statuses
        if kind == "stop" and has_saved and set(statuses) != {STOPPED}:
            raise SoakError(f"{fault}: exit statuses {statuses}, not {STOPPED}; see {job.log}")
        if DONE in statuses:
            raise SoakError(f"{fault}: only some processes finished the run, exit statuses {statuses}; see {job.log}")
        update_after = newest_intact_update(job.folder)
        if kind not in LOSSES and update_after < update_before:
            raise SoakError(f"{fault}: the newest intact checkpoint went back from update {update_before} to {update_after}")
        self.survived[kind] += 1
        self.say(f"{job.name}: {fault} after {delay:.1f} s; exit statuses {statuses}, update {update_after}")
        if update_after > 0 and self.rng.random() < SHARE_OF_OTHER_RUNS:
            self.resume_other_run(job)
        return statuses

    def resume_other_run(self, job: Job) -> None:
        """Try to resume a checkpoint of the undisturbed run in the directory of a job that has ended."""
        other = list_checkpoints(self.args.output / "undisturbed/quickstart/default")[0]
        before = {path: path.stat().st_mtime_ns for path in job.folder.iterdir()}
        started = self.job(job.name, num_processes=1, log="other", arguments=["--resume", other.absolute()])
        statuses = started.end(SECONDS_TO_END)
        if statuses != [USAGE_ERROR] or before != {path: path.stat().st_mtime_ns for path in job.folder.iterdir()}:
            raise SoakError(f"{OTHER_RUN}: exit statuses {statuses}, or files of {job.folder} changed; see {started.log}")
        self.survived[OTHER_RUN] += 1
        self.say(f"{job.name}: {OTHER_RUN} refused")

    def start_second_run(self, job: Job) -> list[int]:
        """Start a second run in the directory of a running job. It must exit with status 2 and must not disturb the job.

        Returns:
            The exit statuses of ``job``, to which ``disturb`` applies a fault if it still runs after the second run has ended.
        """
        update_at_start = newest_update(job.folder)
        job.wait(SECONDS_TO_END, until=lambda: newest_update(job.folder) > update_at_start)
        if not job.running():
            return job.end(0)
        second = self.job(job.name, num_processes=1, log="second")
        statuses, first_is_running = second.end(SECONDS_TO_END), job.running()
        if first_is_running and statuses != [USAGE_ERROR]:
            raise SoakError(f"a second run in the same directory ended with exit statuses {statuses}; see {second.log}")
        if statuses == [USAGE_ERROR]:
            self.survived[SECOND_RUN] += 1
            self.say(f"{job.name}: second run refused at update {newest_update(job.folder)}")
        return self.disturb(job) if job.running() else job.end(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=15.0, help="minutes with faults; the last run then finishes without faults"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the kinds and times of the faults")
    parser.add_argument("--processes", type=int, default=2, help="processes of the training job")
    parser.add_argument(
        "--longest-delay", type=float, default=20.0, help="maximum seconds from the start of the command to the fault"
    )
    parser.add_argument("--output", type=Path, default=Path("soak"), help="directory for data, runs, logs and soak.json")
    args = parser.parse_args()
    if GLOBAL_BATCH_SIZE % args.processes:
        parser.error(f"--processes {args.processes}: must divide the global batch size, {GLOBAL_BATCH_SIZE}")
    if args.output.exists():
        parser.error(f"--output {args.output}: already exists; remove it, or choose another")
    args.output.mkdir(parents=True)

    logging.getLogger("engine.checkpoint_writer").setLevel(logging.ERROR)  # warnings about damaged checkpoints are expected
    soak = Soak(args)
    failure = None
    try:
        soak.make_data()
        expected = soak.train_undisturbed()
        while soak.minutes() < args.minutes:
            soak.train_disturbed(expected)
    except SoakError as error:
        failure = str(error)
    finally:
        for job in soak.jobs:
            job.kill()
    faults = dict(sorted(soak.survived.items()))
    report = {"seed": args.seed, "minutes": round(soak.minutes(), 1), "processes": args.processes, "runs": soak.num_runs}
    report |= {"faults": faults, "total_faults": soak.survived.total(), "failure": failure}
    write_json(args.output / "soak.json", report)
    soak.say(f"{report['total_faults']} faults in {report['runs']} runs: {faults}")
    if failure:
        sys.exit(f"soak.py: {failure}")


if __name__ == "__main__":
    main()
