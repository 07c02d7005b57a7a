"""Train the arms (variants) of an ablation with several seeds, and compare each arm with the baseline.

A YAML file lists the configs, the options shared by all arms, the seeds, and the options of each arm:

    cfg: [quickstart]
    opts: {TRAIN.EPOCHS: 12}
    seeds: [0, 1, 2]
    baseline: softmax
    arms:
      softmax: {MODEL.LA.KIND: softmax}
      focused: {}

Each combination of arm and seed is one run of main.py in <output>/<MODEL.NAME>/<arm>_<seed>. Repeating the command skips
finished runs and resumes the others. The script writes table.md and table.json: mean and standard deviation of the top-1
accuracy over seeds, and the difference of each arm from the baseline, paired by seed, with its 95 % confidence interval.
If a run fails, the other runs continue, and the table has the arms whose runs have all finished; there is no table without
the baseline. A stop signal stops all runs, which save their state.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.command_line import create_parser, reporting_errors
from utils.errors import STOPPED, ConfigError, Stopped, TrainingError
from utils.files import try_lock, write_json, write_text
from utils.run_files import LOCK
from utils.stop import SIGNALS

if TYPE_CHECKING:
    from jobs.ablation import Run

MAIN = Path(__file__).parent.parent / "main.py"


def start(run: "Run", cfg: list[str], *, slot: int, num_slots: int) -> subprocess.Popen:
    """Start ``main.py`` for a run, in one of ``num_slots`` that share the GPUs or CPU cores. The output goes to ``run.log``."""
    from utils.devices import count_cores

    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // num_slots)))
    if gpus := list_gpus():
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    run.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(MAIN), "--cfg", *cfg, "--opts", *run.opts]
    with open(run.log, "a", encoding="utf-8") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def list_gpus() -> list[str]:
    """Names of the GPUs that this process may use, for CUDA_VISIBLE_DEVICES."""
    import torch

    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (visible or list(map(str, range(torch.cuda.device_count()))))[: torch.cuda.device_count()]


def train(runs: "list[Run]", cfg: list[str], *, num_slots: int) -> list[str]:
    """Train the given runs, ``num_slots`` at a time. A run that fails does not end the others.

    Returns:
        One description of each run that has failed.

    Raises:
        Stopped: a signal stopped this process or one of the runs. All runs in progress have received SIGTERM and have ended.
        OSError: a run cannot be started, for example because the disk is full. The others have ended in the same way.
    """
    from jobs.ablation import final_accuracy

    waiting, running, failed, started = deque(runs), {}, [], time.monotonic()
    with recording_signals() as signals:
        try:
            while waiting or running:
                for slot in [slot for slot in range(num_slots) if slot not in running]:
                    if waiting:
                        run = waiting.popleft()
                        running[slot] = run, start(run, cfg, slot=slot, num_slots=num_slots)
                time.sleep(0.2)
                ended = [slot for slot, (_, process) in running.items() if process.poll() is not None]
                if signals:  # after poll(): the same signal may have ended runs
                    raise Stopped(f"stopped by {signals[0].name}")
                for run, process in map(running.pop, ended):
                    if process.returncode == STOPPED:
                        raise Stopped(f"{run.folder.name} was stopped by a signal")
                    result = "finished"
                    if process.returncode:
                        result = f"failed with exit status {process.returncode}, see {run.log}"
                    elif final_accuracy(run) is None:
                        result = f"ended without a finite accuracy of the last epoch, see {run.log}"
                    if result != "finished":
                        failed.append(f"{run.folder.name} {result}")
                    minutes, remaining = (time.monotonic() - started) / 60, len(waiting) + len(running)
                    print(f"[{minutes:5.1f} min] {run.folder.name} {result}, {remaining} remaining", flush=True)
        finally:
            end([process for _, process in running.values()], signals)
    return failed


def end(processes: list[subprocess.Popen], signals: list[signal.Signals]) -> None:
    """Stop runs, which save their state, and wait for them.

    A further signal is passed on; main.py then ends without saving, unless the signals arrive within two seconds. The next one
    kills the runs.
    """
    actions = [subprocess.Popen.kill, subprocess.Popen.terminate, subprocess.Popen.terminate]
    num_signals = -1
    while running := [process for process in processes if process.poll() is None]:
        if len(signals) > num_signals and actions:
            action, num_signals = actions.pop(), len(signals)
            for process in running:
                action(process)
            with suppress(OSError):  # the terminal or pipe may be closed, but the runs must be waited for
                print(f"waiting for {len(running)} runs to end", flush=True)
        time.sleep(0.1)


@contextmanager
def recording_signals() -> Iterator[list[signal.Signals]]:
    """Record the signals that stop training, instead of ending. Ignored ones remain ignored, such as SIGHUP under nohup."""
    received: list[signal.Signals] = []
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in previous.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, lambda number, _: received.append(signal.Signals(number)))
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def write_table(output: Path, runs: "list[Run]", baseline: str) -> None:
    """Write the table of the arms whose runs have all finished, and remove that of an earlier call if the baseline has not."""
    from jobs.ablation import final_accuracy, tabulate, to_markdown

    accuracies: dict[str, list] = {}
    for run in runs:
        accuracies.setdefault(run.arm, []).append(final_accuracy(run))
    finished = {arm: values for arm, values in accuracies.items() if None not in values}
    if missing := [arm for arm in accuracies if arm not in finished]:
        print(f"not in the table, because some of their runs have not finished: {', '.join(missing)}", flush=True)
    if baseline in finished:
        rows = tabulate(finished, baseline)
        write_json(output / "table.json", rows)
        write_text(output / "table.md", to_markdown(rows, baseline))
        print("\n" + to_markdown(rows, baseline))
    else:
        print(f"no table: not all runs of the baseline {baseline} have finished", flush=True)
        for name in ("table.json", "table.md"):
            (output / name).unlink(missing_ok=True)


def main() -> None:
    parser = create_parser(__doc__, "--data-path")
    parser.add_argument("file", type=Path, help="YAML file of the ablation")
    parser.add_argument("--output", type=Path, required=True, help="output directory for the runs and tables")
    parser.add_argument("--baseline", metavar="ARM", help="compare with this arm, instead of the baseline in the file")
    parser.add_argument(
        "--parallel",
        type=int,
        default=0,
        metavar="N",
        help="concurrent runs; 0 (default): one per GPU, or one per two CPU cores if there is no GPU",
    )
    args = parser.parse_args()
    with reporting_errors(parser):
        if args.parallel < 0:
            raise ConfigError(f"--parallel {args.parallel}: must be at least 0")
        if not args.data_path.is_dir():
            raise ConfigError(f"--data-path {args.data_path}: no such directory")
        if args.output.exists() and not args.output.is_dir():
            raise ConfigError(f"--output {args.output}: is a file; choose another directory")
        from jobs.ablation import check_same_recipe, final_accuracy, read_ablation
        from utils.devices import count_cores

        ablation = read_ablation(args.file)
        baseline = args.baseline or ablation.baseline
        if baseline not in ablation.arms:
            raise ConfigError(f"--baseline {baseline}: not an arm; choose one of {', '.join(ablation.arms)}")
        runs = ablation.runs(args.output, args.data_path)
        for run in runs:
            check_same_recipe(run)
        args.output.mkdir(parents=True, exist_ok=True)
        with open(args.output / LOCK, "a") as lock:
            try:
                try_lock(lock)
            except BlockingIOError:
                raise ConfigError(f"--output {args.output}: another ablate.py is writing to it; wait until it ends") from None
            unfinished = [run for run in runs if final_accuracy(run) is None]
            print(f"runs: {len(runs)}, finished: {len(runs) - len(unfinished)}", flush=True)
            num_slots = args.parallel or len(list_gpus()) or max(1, count_cores() // 2)
            try:
                failed = train(unfinished, ablation.cfg, num_slots=max(1, min(num_slots, len(unfinished))))
            except Stopped as stop:
                parser.exit(STOPPED, f"{parser.prog}: {stop}; the same command resumes\n")
            write_table(args.output, runs, baseline)
        if failed:
            raise TrainingError(f"{'; '.join(failed)}; correct the cause and repeat the command")


if __name__ == "__main__":
    main()
