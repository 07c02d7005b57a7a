"""Train the arms (variants) of an ablation with several seeds, and compare each arm with the baseline.

A YAML file lists the configs, the options shared by all arms, the seeds, and the options of each arm:

    cfg: [configs/quickstart.yaml]
    opts: {TRAIN.EPOCHS: 12}
    seeds: [0, 1, 2]
    baseline: softmax
    arms:
      softmax: {MODEL.LA.KIND: softmax}
      focused: {}

Each combination of arm and seed is one run of main.py in <output>/<MODEL.NAME>/<arm>_<seed>. Repeating the command skips
finished runs and resumes the others. The script writes table.md and table.json: mean and standard deviation of the top-1
accuracy over seeds, and the difference of each arm from the baseline, paired by seed, with its 95 % confidence interval.
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_origin

from yacs.config import CfgNode

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.command_line import create_parser, reporting_errors
from utils.config.loading import load_config
from utils.config.reading import read_yaml
from utils.errors import ConfigError, TrainingError
from utils.files import write_json, write_text
from utils.text import markdown_table

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Run:
    """The training run of one arm with one seed."""

    arm: str
    seed: int
    tag: str
    opts: list[str]
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder.parent / f"{self.tag}.txt"


@dataclass(frozen=True)
class Ablation:
    """Contents of an ablation file. ``arms`` maps the name of each arm to its options; the names are those of the keys."""

    cfg: list[str]
    opts: dict
    seeds: list[int]
    baseline: str
    arms: dict[str, dict]

    def runs(self, output: Path) -> list[Run]:
        """List all runs, ordered by seed, so that an interrupted ablation has completed all arms for the first seeds.

        Raises:
            ConfigError: an arm has an invalid option.
        """
        runs = []
        for seed in self.seeds:
            for arm, options in self.arms.items():
                tag = f"{arm.replace(' ', '_')}_{seed}"
                opts, cfg = self.load(options | {"SEED": seed, "TAG": tag, "OUTPUT": str(output)})
                runs.append(Run(arm, seed, tag, opts, output / cfg.MODEL.NAME / tag))
        return runs

    def load(self, options: dict) -> tuple[list[str], CfgNode]:
        """Options shared by all arms and ``options``, as words of the command line, and the config that they give."""
        opts = [str(word) for pair in (self.opts | options).items() for word in pair]
        return opts, load_config([ROOT / path for path in self.cfg], opts)


def read_ablation(path: Path) -> Ablation:
    """Read an ablation file.

    Raises:
        ConfigError: the file cannot be read, or a key is missing, unknown or of the wrong type.
    """
    content = {"opts": {}} | read_yaml(path)
    kinds = {field.name: get_origin(field.type) or field.type for field in fields(Ablation)}
    if mismatched := content.keys() ^ kinds.keys():
        raise ConfigError(f"{path}: unknown or missing keys {', '.join(sorted(mismatched))}; expected {', '.join(kinds)}")
    for key, kind in kinds.items():
        if not isinstance(content[key], kind):
            raise ConfigError(f"{path}: {key}={content[key]!r}: must be a {kind.__name__}")
    if content["baseline"] not in content["arms"]:
        raise ConfigError(f"{path}: baseline={content['baseline']!r}: not an arm; choose one of {', '.join(content['arms'])}")
    if len(content["seeds"]) < 2 or not all(isinstance(seed, int) for seed in content["seeds"]):
        raise ConfigError(f"{path}: seeds={content['seeds']}: give at least two integers, to compute the standard deviation")
    return Ablation(**content | {"arms": {arm: options or {} for arm, options in content["arms"].items()}})


def final_accuracy(run: Run, num_epochs: int) -> float | None:
    """Final top-1 accuracy in percent, of the EMA weights if they were evaluated; None if the run is not finished."""
    from engine.metrics_writer import read_records
    from utils.run_files import METRICS

    records = read_records(run.folder / METRICS)
    last = [record for record in records if record["kind"].startswith("eval_") and record.get("epoch") == num_epochs - 1]
    by_kind = {record["kind"]: record["acc1"] for record in last}
    return by_kind.get("eval_ema", by_kind.get("eval_raw"))


def start(ablation: Ablation, run: Run, data: Path, *, slot: int, num_slots: int) -> subprocess.Popen:
    """Start ``main.py`` for a run, in one of ``num_slots`` that share the GPUs or CPU cores. The output goes to ``run.log``."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_slots)))
    if num_gpus := count_gpus():
        environment["CUDA_VISIBLE_DEVICES"] = str(slot % num_gpus)
    run.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "main.py", "--cfg", *ablation.cfg, "--data-path", str(data.absolute()), "--opts", *run.opts]
    with open(run.log, "a", encoding="utf-8") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def train(ablation: Ablation, runs: list[Run], data: Path, *, num_slots: int) -> None:
    """Train the given runs, ``num_slots`` at a time.

    Raises:
        TrainingError: a run failed. The other runs in progress receive SIGTERM, save their state and exit.
    """
    waiting, running, started = deque(runs), {}, time.monotonic()
    try:
        while waiting or running:
            for slot in [slot for slot in range(num_slots) if slot not in running]:
                if waiting:
                    run = waiting.popleft()
                    running[slot] = run, start(ablation, run, data, slot=slot, num_slots=num_slots)
            time.sleep(0.2)
            for slot, (run, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                if process.returncode:
                    raise TrainingError(f"{run.tag}: exit status {process.returncode}; see {run.log}")
                minutes = (time.monotonic() - started) / 60
                print(f"[{minutes:5.1f} min] {run.tag} finished, {len(waiting) + len(running)} remaining", flush=True)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def paired_difference(first: list[float], second: list[float]) -> tuple[float, float]:
    """Mean of second - first, and the half-width of its 95 % confidence interval (Student's t, paired)."""
    from scipy.stats import t

    differences = [b - a for a, b in zip(first, second, strict=True)]
    count = len(differences)
    return statistics.mean(differences), float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / count**0.5


def tabulate(accuracies: dict[str, list[float]], baseline: str) -> list[dict]:
    """Create one row per arm, highest mean first.

    ``significant`` is true if the 95 % confidence interval of the difference excludes zero. Intervals are not corrected for
    multiple comparisons.
    """
    rows = []
    for arm, values in accuracies.items():
        row = {"arm": arm, "mean": statistics.mean(values), "deviation": statistics.stdev(values), "accuracies": values}
        if arm != baseline:
            row["difference"], row["interval"] = paired_difference(accuracies[baseline], values)
            row["significant"] = abs(row["difference"]) > row["interval"]
        rows.append(row)
    return sorted(rows, key=lambda row: -row["mean"])


def to_markdown(rows: list[dict], baseline: str) -> str:
    cells = []
    for row in rows:
        compared = ["", ""]
        if "difference" in row:
            compared = [f"{row['difference']:+.2f} ± {row['interval']:.2f}", "yes" if row["significant"] else "no"]
        cells.append([row["arm"], f"{row['mean']:.2f} ± {row['deviation']:.2f}", *compared])
    header = ["arm", "top-1, mean ± deviation", f"difference from {baseline}, 95 % interval", "significant"]
    return markdown_table(header, cells) + "\n"


def main() -> None:
    parser = create_parser(__doc__, "--data-path")
    parser.add_argument("file", type=Path, help="YAML file of the ablation")
    parser.add_argument("--output", type=Path, required=True, help="output directory for the runs and tables")
    parser.add_argument(
        "--parallel",
        type=int,
        default=0,
        metavar="N",
        help="concurrent runs; 0 (default): one per GPU, or one per two CPU cores if there is no GPU",
    )
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # SIGHUP is ignored under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # on SystemExit, train() terminates the runs
    with reporting_errors(parser):
        if args.parallel < 0:
            raise ConfigError(f"--parallel {args.parallel}: must be at least 0")
        ablation = read_ablation(args.file)
        runs = ablation.runs(args.output.absolute())
        cfg = load_config([ROOT / path for path in ablation.cfg], runs[0].opts)
        num_epochs = cfg.TRAIN.EPOCHS + cfg.TRAIN.COOLDOWN_EPOCHS
        if not args.data_path.is_dir():
            raise ConfigError(f"--data-path {args.data_path}: no such directory")
        unfinished = [run for run in runs if final_accuracy(run, num_epochs) is None]
        print(f"runs: {len(runs)}, finished: {len(runs) - len(unfinished)}, epochs per run: {num_epochs}", flush=True)
        num_slots = args.parallel or count_gpus() or max(1, (os.cpu_count() or 1) // 2)
        train(ablation, unfinished, args.data_path, num_slots=num_slots)
        accuracies = {arm: [final_accuracy(run, num_epochs) for run in runs if run.arm == arm] for arm in ablation.arms}
        if lacking := [run for run in runs if final_accuracy(run, num_epochs) is None]:
            raise TrainingError(f"{lacking[0].folder}: finished, but its metrics lack the last evaluation; repeat the command")
        rows = tabulate(accuracies, ablation.baseline)
        write_json(args.output / "table.json", rows)
        write_text(args.output / "table.md", to_markdown(rows, ablation.baseline))
    print(to_markdown(rows, ablation.baseline))


if __name__ == "__main__":
    main()
