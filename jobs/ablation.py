"""Ablations: the arms (variants) that an ablation file defines, their runs, and the results of these runs."""

import os
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from yacs.config import CfgNode

from engine.metrics import own_evaluations
from engine.metrics_writer import read_records
from engine.schedule import count_epochs, global_batch_size
from utils.config.keys import KEYS, RECIPE_KEY_PREFIXES
from utils.config.loading import MAY_BE_NONE, find_config, flatten, load_config
from utils.config.reading import read_yaml
from utils.errors import ConfigError
from utils.files import read_csv
from utils.run_files import CONFIG, METRICS, build_output_path, has_checkpoints
from utils.text import markdown_table

# An arm's name is part of a directory's name, in which "_" replaces spaces, and a label in tables and pictures.
_ARM = re.compile(r"[^\W_](?:[ .,=+-]*[^\W_])*")
_TYPES = {"cfg": list, "opts": dict, "seeds": list, "baseline": str, "arms": dict}  # of the entries of an ablation file
_KEYS_OF_A_RUN = {  # set for each run -> where to give them instead
    "SEED": "list it in seeds",
    "TAG": "name the arm",
    "OUTPUT": "give --output",
    "DATA.DATA_PATH": "give --data-path",
}
_RECIPE_KEYS_WITHOUT_EFFECT = (  # on the accuracy: keys of speed, memory and files
    "TRAIN.RECIPE_BATCH_SIZE",
    "TRAIN.USE_CHECKPOINT",
    "TRAIN.COMPILE",
    "TRAIN.AUTO_RESUME",
    "EMA.FORCE_CPU",
    "CUDNN_BENCHMARK",
    "EVAL_FREQ",
    "BEST_METRIC",
)
_FURTHER_KEYS = (  # with an effect on the accuracy
    "MODEL.PRETRAINED",
    "DATA.TRAIN_SPLIT",
    "DATA.VAL_SPLIT",
    "DATA.UNREADABLE",
    "TEST.PRECISION",
    "TEST.CLASS_MAP",
    "TEST.RESTRICT_CLASSES",
)
_RECIPE_KEYS = {key for key in KEYS if key.startswith(RECIPE_KEY_PREFIXES)}
_COMPARED_KEYS = _RECIPE_KEYS.difference(_RECIPE_KEYS_WITHOUT_EFFECT).union(_FURTHER_KEYS)


@dataclass(frozen=True)
class Run:
    """The training run of one arm with one seed.

    Attributes:
        opts: options of main.py, as KEY=VALUE.
        cfg: the config that they give.
    """

    arm: str
    seed: int
    opts: list[str]
    cfg: CfgNode

    @property
    def folder(self) -> Path:
        return build_output_path(self.cfg)

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.txt")


@dataclass(frozen=True)
class Ablation:
    """Contents of an ablation file. ``arms`` maps the name of each arm to its options; the names are those of the keys."""

    cfg: list[str]
    opts: dict
    seeds: list[int]
    baseline: str
    arms: dict[str, dict]

    def runs(self, output: Path, data: Path) -> list[Run]:
        """List all runs, ordered by seed, so that an interrupted ablation has completed all arms for the first seeds.

        Raises:
            ConfigError: an arm has an invalid option, or may end at any epoch.
        """
        runs = []
        for seed in self.seeds:
            for arm in self.arms:
                tag = f"{arm.replace(' ', '_')}_{seed}"
                own = {"SEED": seed, "TAG": tag, "OUTPUT": output.absolute(), "DATA.DATA_PATH": data.absolute()}
                opts, cfg = self.load(arm, own)
                if cfg.TRAIN.PATIENCE:
                    advice = "set TRAIN.PATIENCE: 0 in opts or in the arm"
                    raise ConfigError(f"{arm}: TRAIN.PATIENCE={cfg.TRAIN.PATIENCE}: runs of different length; {advice}")
                runs.append(Run(arm, seed, opts, cfg))
        return runs

    def load(self, arm: str, options: dict) -> tuple[list[str], CfgNode]:
        """Options of an arm and ``options``, as KEY=VALUE, and the config that they give."""
        opts = [f"{key}={value}" for key, value in (self.opts | self.arms[arm] | options).items()]
        return opts, load_config(self.cfg, opts)


def read_ablation(path: Path) -> Ablation:
    """Read an ablation file. Its configs are names or paths, as for main.py.

    Raises:
        ConfigError: the file cannot be read, or a key is missing, unknown or has an illegal value.
    """
    content = {"opts": {}} | read_yaml(path)
    if mismatched := content.keys() ^ _TYPES.keys():
        raise ConfigError(f"{path}: unknown or missing keys {', '.join(sorted(mismatched))}; expected {', '.join(_TYPES)}")
    for key, kind in _TYPES.items():
        if not isinstance(content[key], kind):
            raise ConfigError(f"{path}: {key}={content[key]!r}: must be a {kind.__name__}")
    cfg, arms, seeds = content["cfg"], content["arms"], content["seeds"]
    if not cfg or not all(isinstance(name, str) for name in cfg):
        raise ConfigError(f"{path}: cfg={cfg}: give at least one config file")
    for arm in arms:
        if not _ARM.fullmatch(arm):
            raise ConfigError(f"{path}: arm {arm!r}: use letters and digits, with spaces or . , = + - between them")
    arms = {arm: {} if options is None else options for arm, options in arms.items()}
    _check_options(f"{path}: opts", content["opts"])
    for arm, options in arms.items():
        _check_options(f"{path}: arm {arm}", options)
    if content["baseline"] not in arms:
        raise ConfigError(f"{path}: baseline={content['baseline']!r}: not an arm; choose one of {', '.join(arms)}")
    if len(seeds) < 2 or not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{path}: seeds={seeds}: give at least two different integers, which must not be negative")
    names = [str(find_config(name).absolute()) for name in cfg]
    return Ablation(**content | {"cfg": names, "arms": arms})


def _check_options(where: str, options: object) -> None:
    """Check that options are a mapping from keys to values.

    Raises:
        ConfigError: they are not, or set a key that every run sets itself.
    """
    if not isinstance(options, dict):
        raise ConfigError(f"{where}: {options!r} must be a mapping, such as {{TRAIN.EPOCHS: 12}}")
    for key, value in options.items():
        if key in _KEYS_OF_A_RUN:
            raise ConfigError(f"{where}: {key} is set for each run; remove it, and {_KEYS_OF_A_RUN[key]}")
        if value is None and key not in MAY_BE_NONE:
            raise ConfigError(f"{where}: {key} has no value; give one, or '' for an empty string")


def check_same_recipe(run: Run) -> None:
    """Check that an earlier run in the same directory, if there is one, had the same recipe and data.

    Keys that an earlier version did not store are not compared, nor is a data directory that no longer exists (it may have been
    moved).

    Raises:
        ConfigError: the stored recipe or data directory differs.
    """
    path = run.folder / CONFIG
    if not path.is_file() or not (has_checkpoints(run.folder) or final_accuracy(run)):  # a run that failed may be corrected
        return
    stored = flatten(read_yaml(path))
    for key, value in flatten(run.cfg).items():
        if key in _COMPARED_KEYS and stored.get(key, value) != value:
            advice = f"restore {key}, move that directory away to train the run again, or choose another --output"
            raise ConfigError(f"{run.folder} was trained with {key}={stored[key]!r}, and has {value!r} now; {advice}")
    before, data = str(stored.get("DATA.DATA_PATH", "")), run.cfg.DATA.DATA_PATH
    if os.path.isdir(before) and os.path.isdir(data) and not os.path.samefile(before, data):
        raise ConfigError(f"{run.folder} was trained on {before}; give --data-path {before}, or choose another --output")


def final_accuracy(run: Run) -> float | None:
    """Top-1 accuracy in percent after the last epoch, of the EMA weights with EMA.ENABLED; None if the run is not finished."""
    kind, last_epoch = "eval_ema" if run.cfg.EMA.ENABLED else "eval_raw", count_epochs(run.cfg) - 1
    for record in own_evaluations(read_records(run.folder / METRICS)).values():
        if record["kind"] == kind and record.get("epoch") == last_epoch:
            return record.get("acc1")
    return None


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
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
    rows: list[dict] = []
    for arm, values in accuracies.items():
        row: dict = {"arm": arm, "mean": statistics.mean(values), "deviation": statistics.stdev(values), "accuracies": values}
        if arm != baseline:
            difference, half_width = paired_difference(accuracies[baseline], values)
            row |= {"difference": difference, "interval": half_width, "significant": abs(difference) > half_width}
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


class Evaluation(NamedTuple):
    """One evaluation of one run.

    Attributes:
        epoch: number of completed epochs.
        step: number of updates.
        num_images: number of images in these updates; repeated images count each time.
        weights: raw or ema; ema if both were evaluated.
        accuracy: top-1 in percent.
        loss: NaN if it was not finite.
    """

    arm: str
    seed: int
    epoch: int
    step: int
    num_images: int
    weights: str
    accuracy: float
    loss: float


def find_runs(ablation: Path) -> dict[tuple[str, int], Path]:
    """Arm and seed -> directory of the run, for all runs in the output directory of scripts/ablate.py.

    Raises:
        ConfigError: there is no run, or there are two runs of the same arm and seed.
    """
    runs: dict[tuple[str, int], Path] = {}
    for metrics in sorted(ablation.glob(f"*/*/{METRICS}")):
        if match := re.fullmatch(r"(.+)_(\d+)", metrics.parent.name):
            name = match[1].replace("_", " "), int(match[2])
            if name in runs:
                raise ConfigError(f"{runs[name]} and {metrics.parent} have the same arm and seed; move one of them")
            runs[name] = metrics.parent
    if not runs:
        raise ConfigError(
            f"{ablation} contains no runs <model>/<arm>_<seed>/{METRICS}; give the output directory of scripts/ablate.py"
        )
    return runs


def read_run(run: Path, arm: str, seed: int) -> list[Evaluation]:
    """Evaluations of a run with one process, in the order of its updates.

    Raises:
        ConfigError: a file of the run lacks an entry.
    """
    try:
        images_per_update = global_batch_size(CfgNode(read_yaml(run / CONFIG)), 1)
        return list(_read_evaluations(run / METRICS, images_per_update, arm, seed))
    except (KeyError, AttributeError, TypeError) as error:
        problem = f"is damaged or was written by another program ({error!r})"
        raise ConfigError(f"{run}: {CONFIG} or {METRICS} {problem}; move the run out of the directory") from None


def _read_evaluations(metrics: Path, images_per_update: int, arm: str, seed: int) -> Iterator[Evaluation]:
    for step, record in own_evaluations(read_records(metrics)).items():
        weights = record["kind"].removeprefix("eval_")
        loss = float("nan") if record["loss"] is None else float(record["loss"])  # JSON has no NaN or infinity
        num_images = step * images_per_update
        yield Evaluation(arm, seed, record["epoch"] + 1, step, num_images, weights, float(record["acc1"]), loss)


def read_evaluations(source: Path) -> list[Evaluation]:
    """Evaluations of all runs of an ablation, from its output directory or from a CSV file with the columns of ``Evaluation``.

    Raises:
        ConfigError: there are no runs, or the file has other columns.
    """
    if source.is_dir():
        runs = find_runs(source).items()
        return [evaluation for (arm, seed), run in runs for evaluation in read_run(run, arm, seed)]
    return read_csv(source, Evaluation, ("arm", "seed", "step"))
