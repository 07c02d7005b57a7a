"""Ablations: the arms (variants) that an ablation file defines, their runs, and the table of their results."""

import math
import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from engine.metrics import own_evaluations
from engine.metrics_writer import read_records
from engine.schedule import count_epochs
from utils.config.arguments import expand
from utils.config.loading import MAY_BE_NONE, find_config, flatten, load_config
from utils.config.reading import read_yaml
from utils.errors import ConfigError
from utils.run_files import CONFIG, METRICS, build_output_path, has_checkpoints
from utils.text import markdown_table

# An arm's name is part of a directory's name, in which "_" replaces spaces, and a label in tables and pictures.
_ARM = re.compile(r"[^\W_](?:[ .,=+-]*[^\W_])*")
_ENTRIES = {  # entry of an ablation file -> type and its name in messages
    "cfg": (list, "list"),
    "opts": (dict, "mapping"),
    "seeds": (list, "list"),
    "baseline": (str, "name"),
    "arms": (dict, "mapping"),
}
_ADVICE = {  # key that an ablation file must not set -> what to do instead
    "SEED": "list it in seeds",
    "TAG": "name the arm",
    "OUTPUT": "give --output",
    "DATA.DATA_PATH": "give --data-path",
    "MODEL.RESUME": "set MODEL.PRETRAINED for initial weights",
    "TRAIN.AUTO_RESUME": "use another --output to train again",
}
_FILE_KEYS = ("MODEL.PRETRAINED", "TRAIN.TEACHER", "TEST.CLASS_MAP")
# Prefixes of the keys without effect on the accuracy: those of speed, memory and files. DATA.DATA_PATH is compared separately.
_UNCOMPARED_KEY_PREFIXES = (
    "BASE",
    "DATA.DATA_PATH",
    "DATA.DATASET",
    "DATA.ZIP_MODE",
    "DATA.CACHE_MODE",
    "DATA.INDEX_CACHE",
    "DATA.MAX_UNREADABLE",
    "DATA.ACCEPT_CHANGES",
    "DATA.NUM_WORKERS",
    "DATA.WORKER_TIMEOUT",
    "DATA.PIN_MEMORY",
    "MODEL.LA.BACKEND",
    "TRAIN.RECIPE_BATCH_SIZE",
    "TRAIN.USE_CHECKPOINT",
    "TRAIN.COMPILE",
    "EMA.FORCE_CPU",
    "TEST.BATCH_SIZE",
    "TEST.REAL_LABELS",
    "TEST.PREDICTIONS",
    "TEST.MISTAKES",
    "TEST.TTA",
    "DETERMINISTIC",
    "CUDNN_BENCHMARK",
    "COLLECTIVE_TIMEOUT",
    "OUTPUT",
    "PRINT_FREQ",
    "TRACKER",
    "SAVE_",
    "KEEP_",
    "EVAL_FREQ",
    "BEST_METRIC",
    "ATTENTION_IMAGE",
)


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
        """The run directory."""
        return build_output_path(self.cfg)

    @property
    def log(self) -> Path:
        """File for the console output of the run, beside its directory."""
        return self.folder.with_name(f"{self.folder.name}.txt")


@dataclass(frozen=True)
class Ablation:
    """Contents of an ablation file. The attributes have the names of its entries; ``arms`` maps each arm to its options."""

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
                    raise ConfigError(f"arm {arm}: TRAIN.PATIENCE={cfg.TRAIN.PATIENCE}: runs of different length; {advice}")
                runs.append(Run(arm, seed, opts, cfg))
        return runs

    def load(self, arm: str, options: dict) -> tuple[list[str], CfgNode]:
        """Options of an arm and ``options``, as KEY=VALUE, and the config that they give. Relative paths become absolute.

        Raises:
            ConfigError: an option is invalid.
        """
        values = self.opts | self.arms[arm] | options
        for key in _FILE_KEYS:
            if (text := str(values.get(key, ""))) and expand(text).exists():
                values[key] = expand(text).absolute()
        opts = [f"{key}={value}" for key, value in values.items()]
        try:
            return opts, load_config(self.cfg, opts)
        except ConfigError as error:
            raise ConfigError(f"arm {arm}: {str(error).removeprefix('--opts: ')}") from None


def read_ablation(path: Path) -> Ablation:
    """Read an ablation file. Its configs are names or paths, as for main.py.

    Raises:
        ConfigError: the file cannot be read, or a key is missing, unknown or has an illegal value.
    """
    content = {"opts": {}} | read_yaml(path)
    if mismatched := content.keys() ^ _ENTRIES.keys():
        raise ConfigError(f"{path}: unknown or missing keys {', '.join(sorted(mismatched))}; expected {', '.join(_ENTRIES)}")
    if content["opts"] is None:
        content["opts"] = {}
    for key, (kind, name) in _ENTRIES.items():
        if not isinstance(content[key], kind):
            raise ConfigError(f"{path}: {key}={content[key]!r}: must be a {name}")
    cfg, arms, seeds = content["cfg"], content["arms"], content["seeds"]
    if not cfg or not all(isinstance(name, str) for name in cfg):
        raise ConfigError(f"{path}: cfg={cfg}: give names or paths of config files")
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
        ConfigError: they are not, or set a key of ``_ADVICE``.
    """
    if not isinstance(options, dict):
        raise ConfigError(f"{where}: {options!r} must be a mapping, such as {{TRAIN.EPOCHS: 12}}")
    for key, value in options.items():
        if key in _ADVICE:
            raise ConfigError(f"{where}: {key} cannot be set in an ablation file; remove it, and {_ADVICE[key]}")
        if value is None and key not in MAY_BE_NONE:
            raise ConfigError(f"{where}: {key} has no value; give one, or '' for an empty string")


def check_same_recipe(run: Run) -> None:
    """Check that an earlier run in the same directory, if there is one, had the same recipe and data.

    Keys that an earlier version did not store are not compared, nor is a data directory that no longer exists (it may have been
    moved).

    Raises:
        ConfigError: the stored recipe or data directory differs.
    """
    if not has_checkpoints(run.folder) and not own_evaluations(read_records(run.folder / METRICS)):
        return  # a run that failed at its start may be corrected
    path = run.folder / CONFIG
    if not path.is_file():
        raise ConfigError(f"{run.folder} has results, but no {CONFIG}; move that directory away to train the run again")
    stored = flatten(read_yaml(path))
    for key, value in flatten(run.cfg).items():
        if not key.startswith(_UNCOMPARED_KEY_PREFIXES) and stored.get(key, value) != value:
            advice = f"restore {key}, move that directory away to train the run again, or choose another --output"
            raise ConfigError(f"{run.folder} was trained with {key}={stored[key]!r}, and has {value!r} now; {advice}")
    before, data = str(stored.get("DATA.DATA_PATH", "")), run.cfg.DATA.DATA_PATH
    if os.path.isdir(before) and os.path.isdir(data) and not os.path.samefile(before, data):
        raise ConfigError(f"{run.folder} was trained on {before}; give --data-path {before}, or choose another --output")


def final_accuracy(run: Run) -> float | None:
    """Top-1 accuracy in percent after the last epoch, of the EMA weights with EMA.ENABLED; None if it is missing or NaN."""
    kind, last_epoch = "eval_ema" if run.cfg.EMA.ENABLED else "eval_raw", count_epochs(run.cfg) - 1
    for record in own_evaluations(read_records(run.folder / METRICS)).values():
        if record["kind"] == kind and record.get("epoch") == last_epoch:
            accuracy = record.get("acc1")
            return accuracy if isinstance(accuracy, (int, float)) and math.isfinite(accuracy) else None
    return None


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean of second - first, and the half-width of its 95 % confidence interval (Student's t, paired)."""
    from scipy.stats import t

    differences = [round(b - a, 9) for a, b in zip(first, second, strict=True)]  # equal ones must not differ by rounding errors
    count = len(differences)
    return statistics.mean(differences), float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / count**0.5


def tabulate(accuracies: dict[str, list[float]], baseline: str) -> list[dict]:
    """Create one row per arm, highest mean first.

    ``significant`` is true if the 95 % confidence interval of the difference excludes zero. Intervals are not corrected for
    multiple comparisons. If the difference is the same for all seeds, which is chance, it is not significant.
    """
    rows: list[dict] = []
    for arm, values in accuracies.items():
        row: dict = {"arm": arm, "mean": statistics.mean(values), "deviation": statistics.stdev(values), "accuracies": values}
        if arm != baseline:
            difference, half_width = paired_difference(accuracies[baseline], values)
            row |= {"difference": difference, "interval": half_width, "significant": abs(difference) > half_width > 0}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["mean"])


def to_markdown(rows: list[dict], baseline: str) -> str:
    """Rows of ``tabulate`` as a Markdown table, in percent and percentage points."""
    cells = []
    for row in rows:
        compared = ["", ""]
        if "difference" in row:
            compared = [f"{row['difference']:+.2f} ± {row['interval']:.2f}", "yes" if row["significant"] else "no"]
        cells.append([row["arm"], f"{row['mean']:.2f} ± {row['deviation']:.2f}", *compared])
    header = ["arm", "top-1, mean ± deviation", f"difference from {baseline}, 95 % interval", "significant"]
    return markdown_table(header, cells) + "\n"
