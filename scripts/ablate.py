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
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.command_line import create_parser, reporting_errors
from utils.errors import STOPPED, ConfigError, Stopped, TrainingError
from utils.files import write_json, write_text
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
        Descriptions of the runs that have failed.

    Raises:
        Stopped: a signal stopped this process or one of the runs. All runs in progress have received SIGTERM and have ended.
    """
    waiting, running, failed, started = deque(runs), {}, [], time.monotonic()
    signals = record_signals()
    try:
        while waiting or running:
            if signals:
                raise Stopped(f"stopped by {signals[0].name}")
            for slot in [slot for slot in range(num_slots) if slot not in running]:
                if waiting:
                    run = waiting.popleft()
                    running[slot] = run, start(run, cfg, slot=slot, num_slots=num_slots)
            time.sleep(0.2)
            for slot, (run, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                if process.returncode == STOPPED:
                    raise Stopped(f"{run.folder.name} was stopped by a signal")
                if process.returncode:
                    failed.append(f"{run.folder.name}: exit status {process.returncode}; see {run.log}")
                result = "failed" if process.returncode else "finished"
                minutes = (time.monotonic() - started) / 60
                print(f"[{minutes:5.1f} min] {run.folder.name} {result}, {len(waiting) + len(running)} remaining", flush=True)
    finally:
        end([process for _, process in running.values()], signals)
    return failed


def end(processes: list[subprocess.Popen], signals: list[signal.Signals]) -> None:
    """Stop runs, which save their state, and wait for them. Each further signal is passed on: it ends them without saving."""
    num_passed_on = 0
    while any(process.poll() is None for process in processes):
        if num_passed_on < max(1, len(signals)):
            num_passed_on = max(1, len(signals))
            for process in processes:
                process.terminate()
        time.sleep(0.1)


def record_signals() -> list[signal.Signals]:
    """From now on, record the signals that stop training. Ignored ones remain ignored, such as SIGHUP under nohup."""
    received: list[signal.Signals] = []
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: received.append(signal.Signals(number)))
    return received


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
        from jobs.ablation import check_same_recipe, final_accuracy, read_ablation, tabulate, to_markdown
        from utils.devices import count_cores

        ablation = read_ablation(args.file)
        baseline = args.baseline or ablation.baseline
        if baseline not in ablation.arms:
            raise ConfigError(f"--baseline {baseline}: not an arm; choose one of {', '.join(ablation.arms)}")
        runs = ablation.runs(args.output, args.data_path)
        for run in runs:
            check_same_recipe(run)
        args.output.mkdir(parents=True, exist_ok=True)
        unfinished = [run for run in runs if final_accuracy(run) is None]
        print(f"runs: {len(runs)}, finished: {len(runs) - len(unfinished)}", flush=True)
        num_slots = args.parallel or len(list_gpus()) or max(1, count_cores() // 2)
        try:
            failed = train(unfinished, ablation.cfg, num_slots=max(1, min(num_slots, len(unfinished))))
        except Stopped as stop:
            parser.exit(STOPPED, f"{stop}; the same command resumes\n")

        finals = {arm: [final_accuracy(run) for run in runs if run.arm == arm] for arm in ablation.arms}
        accuracies = {arm: values for arm, values in finals.items() if None not in values}
        rows = tabulate(accuracies, baseline) if baseline in accuracies else []
        if not rows:
            print(f"no table: not all runs of the baseline {baseline} have finished", flush=True)
        else:
            write_json(args.output / "table.json", rows)
            write_text(args.output / "table.md", to_markdown(rows, baseline))
            print("\n" + to_markdown(rows, baseline))
        lacking = [f"{run.folder}: its metrics lack the last evaluation" for run in runs if final_accuracy(run) is None]
        if problems := failed or lacking:
            further = f" (and {len(problems) - 1} more)" if problems[1:] else ""
            raise TrainingError(f"{problems[0]}{further}; correct the cause and repeat the command")


if __name__ == "__main__":
    main()
