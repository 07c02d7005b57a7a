"""Configuration: defaults, BASE files, a file, the command line, in this order; then checked and frozen.

Every key, its default and its meaning stand in ``_defaults``, once.
"""

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml
from yacs.config import CfgNode

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


class ConfigError(ValueError):
    """A setting that cannot work. The text names key, value and remedy."""


def _defaults() -> CfgNode:
    cfg = CfgNode()
    cfg.BASE = [""]  # files that this one completes, relative to it

    cfg.DATA = CfgNode()
    cfg.DATA.DATA_PATH = ""  # folder that holds train/ and val/, each with one folder a class
    cfg.DATA.DATASET = "imagenet"  # the only layout: <split>/<class>/<image>, of any number of classes
    cfg.DATA.ZIP_MODE = False  # read <split>.zip and <split>_map.txt instead of folders (--zip)
    cfg.DATA.CACHE_MODE = "part"  # of zip archives: bytes to keep in memory, no, full, or part for every process's share
    cfg.DATA.INDEX_CACHE = "~/.cache/flatten"  # folder that keeps the list of a large split's images; "" to scan at each start
    cfg.DATA.UNREADABLE = "error"  # an unreadable training image: error, skip, or replace by another; evaluation: always error
    cfg.DATA.MAX_UNREADABLE = 100  # of skip and replace: so many a process may meet before the run ends
    cfg.DATA.BATCH_SIZE = 128  # images per process and forward pass
    cfg.DATA.GLOBAL_BATCH_SIZE = 0  # images per update, over as many forward passes as it takes; 0: see ACCUMULATION_STEPS
    cfg.DATA.IMG_SIZE = 224  # pixels
    cfg.DATA.INTERPOLATION = "bicubic"  # bicubic, bilinear, or random (training only)
    cfg.DATA.MEAN = IMAGENET_MEAN  # per channel, of values in [0, 1]
    cfg.DATA.STD = IMAGENET_STD  # likewise
    cfg.DATA.NUM_WORKERS = 8  # loader processes per training process
    cfg.DATA.PIN_MEMORY = True  # page-locked batches, for faster copies to a GPU

    cfg.MODEL = CfgNode()
    cfg.MODEL.TYPE = "flatten_swin"  # the family, see models/registry.py
    cfg.MODEL.NAME = "flatten_swin_t"  # names the run's folder
    cfg.MODEL.NUM_CLASSES = 1000  # must be that of the data
    cfg.MODEL.DROP_RATE = 0.0  # dropout of embeddings, projections and MLPs
    cfg.MODEL.DROP_PATH_RATE = 0.1  # stochastic depth of the last block; grows from 0 over the network
    cfg.MODEL.LABEL_SMOOTHING = 0.1  # share of the target given to all classes alike
    cfg.MODEL.RESUME = ""  # checkpoint to go on from, or to evaluate (--resume)
    cfg.MODEL.PRETRAINED = ""  # checkpoint whose weights alone are the start (--pretrained)

    cfg.MODEL.SWIN = CfgNode()
    cfg.MODEL.SWIN.PATCH_SIZE = 4  # pixels
    cfg.MODEL.SWIN.EMBED_DIM = 96  # channels of the first stage; each next one has twice as many
    cfg.MODEL.SWIN.DEPTHS = [2, 2, 6, 2]  # blocks of each stage
    cfg.MODEL.SWIN.NUM_HEADS = [3, 6, 12, 24]  # of each stage
    cfg.MODEL.SWIN.WINDOW_SIZE = 7  # of linear blocks, capped at the map; softmax blocks: 7, or 12 where this is > 56
    cfg.MODEL.SWIN.MLP_RATIO = 4.0  # hidden over outer channels
    cfg.MODEL.SWIN.QKV_BIAS = True  # the projections to q, k and v have biases
    cfg.MODEL.SWIN.PATCH_NORM = True  # norm after the patch embedding

    cfg.MODEL.LA = CfgNode()
    cfg.MODEL.LA.FOCUSING_FACTOR = 3  # p of the paper's eq. 6
    cfg.MODEL.LA.KERNEL_SIZE = 5  # of the depthwise convolution; odd
    cfg.MODEL.LA.ATTN_TYPE = "LLLL"  # a letter a stage: L linear, S softmax, M the first n blocks L (LLMS3: n = 3)
    cfg.MODEL.LA.PVT_LA_SR_RATIOS = "1111"  # PVT: spatial reduction of linear blocks, a digit a stage
    cfg.MODEL.LA.CSWIN_LA_SPLIT_SIZE = "56-28-14-7"  # CSwin: stripe width of linear blocks, a number a stage
    cfg.MODEL.LA.KIND = "focused"  # or relu, efficient, hydra, angular, enhanced, softmax, as the paper compares
    cfg.MODEL.LA.FOCUSING = True  # False: without the focused function
    cfg.MODEL.LA.RANK_RESTORATION = True  # False: without the depthwise convolution

    cfg.TRAIN = CfgNode()
    cfg.TRAIN.EPOCHS = 300  # without those of the cooldown
    cfg.TRAIN.WARMUP_EPOCHS = 20  # linear from WARMUP_LR; the schedule runs beneath, so they are no extra epochs
    cfg.TRAIN.COOLDOWN_EPOCHS = 0  # extra epochs at MIN_LR at the end
    cfg.TRAIN.BASE_LR = 5e-4  # the three rates are per 512 images of the global batch
    cfg.TRAIN.RECIPE_BATCH_SIZE = 1024  # images per update that the recipe was made with; the log warns of others
    cfg.TRAIN.WARMUP_LR = 5e-7  # at the first update
    cfg.TRAIN.MIN_LR = 5e-6  # at the end
    cfg.TRAIN.WEIGHT_DECAY = 0.05  # of matrices and kernels; norms, biases and relative-position tables have none
    cfg.TRAIN.LAYER_DECAY = 1.0  # a layer's learning rate over that of the layer behind it; 1: all have the same
    cfg.TRAIN.HEAD_LR_SCALE = 1.0  # the head's learning rate over what it would be
    cfg.TRAIN.FREEZE_BACKBONE = False  # train the head alone (linear probe), on features as in evaluation
    cfg.TRAIN.CLIP_GRAD = 5.0  # L2 norm of all gradients; 0 for no clipping
    cfg.TRAIN.ACCUMULATION_STEPS = 0  # forward passes per update; 0 and 1 mean one
    cfg.TRAIN.USE_CHECKPOINT = False  # recompute activations to save memory (--use-checkpoint)
    cfg.TRAIN.COMPILE = False  # torch.compile
    cfg.TRAIN.AUTO_RESUME = True  # go on from the newest checkpoint of the output folder

    cfg.TRAIN.LR_SCHEDULER = CfgNode()
    cfg.TRAIN.LR_SCHEDULER.NAME = "cosine"  # cosine, linear or step
    cfg.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30  # of step: every so often ...
    cfg.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1  # ... times this

    cfg.TRAIN.OPTIMIZER = CfgNode()
    cfg.TRAIN.OPTIMIZER.NAME = "adamw"  # adamw or sgd
    cfg.TRAIN.OPTIMIZER.EPS = 1e-8  # of adamw
    cfg.TRAIN.OPTIMIZER.BETAS = [0.9, 0.999]  # of adamw
    cfg.TRAIN.OPTIMIZER.MOMENTUM = 0.9  # of sgd

    cfg.AUG = CfgNode()
    cfg.AUG.COLOR_JITTER = 0.4  # without effect where AUTO_AUGMENT is on, as in timm
    cfg.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"  # a timm policy, or none
    cfg.AUG.SCALE = [0.08, 1.0]  # share of the area that a random crop takes
    cfg.AUG.RATIO = [3 / 4, 4 / 3]  # its width over height
    cfg.AUG.HFLIP = 0.5  # probability
    cfg.AUG.REPROB = 0.25  # random erasing: probability ...
    cfg.AUG.REMODE = "pixel"  # ... fill: pixel, rand or const ...
    cfg.AUG.RECOUNT = 1  # ... and at most so many rectangles
    cfg.AUG.REPEATS = 1  # how often an epoch shows an image, drawn anew each time; it shows that much fewer (DeiT: 3)
    cfg.AUG.MIXUP = 0.8  # alpha; 0 is off
    cfg.AUG.CUTMIX = 1.0  # alpha; 0 is off
    cfg.AUG.CUTMIX_MINMAX = None  # [smallest, largest] side of the patch, instead of CUTMIX
    cfg.AUG.MIXUP_PROB = 1.0  # of mixing a batch at all
    cfg.AUG.MIXUP_SWITCH_PROB = 0.5  # of cutmix where both are on
    cfg.AUG.MIXUP_MODE = "batch"  # batch, pair or elem

    cfg.EMA = CfgNode()
    cfg.EMA.ENABLED = False  # keep and evaluate an average of the weights (--model-ema, --no-model-ema)
    cfg.EMA.DECAY = 0.9999  # per update (--model-ema-decay)
    cfg.EMA.FORCE_CPU = False  # keep it in host memory (--model-ema-force-cpu)

    cfg.TEST = CfgNode()
    cfg.TEST.CROP = True  # resize to int(256 / 224 * IMG_SIZE) square and take the centre; False: straight to IMG_SIZE
    cfg.TEST.BATCH_SIZE = 0  # images per process; 0 for DATA.BATCH_SIZE
    cfg.TEST.CLASS_MAP = ""  # --eval on other classes than the model's: imagenet for -A, -R, -V2 and -Sketch, or a file
    cfg.TEST.REAL_LABELS = ""  # --eval with ImageNet's ReaL labels too: their real.json
    cfg.TEST.PREDICTIONS = False  # --eval writes every image's answer too, for scripts/compare_evals.py
    cfg.TEST.PRECISION = "fp32"  # fp32, or train for the precision of training

    cfg.AMP = False  # mixed precision in training (--amp)
    cfg.AMP_DTYPE = "bf16"  # bf16, or fp16 with a loss scaler
    cfg.OUTPUT = "output"  # runs go to <OUTPUT>/<MODEL.NAME>/<TAG>
    cfg.TAG = "default"  # names the run (--tag)
    cfg.SEED = 0  # of weights, order, augmentation, mixing and drop path
    cfg.PRINT_FREQ = 10  # updates between log lines
    cfg.SAVE_FREQ = 1  # epochs between checkpoints
    cfg.SAVE_STEPS = 0  # updates between checkpoints within an epoch; 0 for none
    cfg.EVAL_FREQ = 1  # epochs between evaluations
    cfg.KEEP_CHECKPOINTS = 2  # newest checkpoints to keep, beside the best
    return cfg


# Keys of the reference that select nothing here: taken at the value that they have there, and dropped.
_REFERENCE_ONLY = {
    "AMP_OPT_LEVEL": "",
    "EVAL_MODE": False,
    "THROUGHPUT_MODE": False,
    "LOCAL_RANK": 0,
    "MODEL.SWIN.APE": False,
    "MODEL.SWIN.IN_CHANS": 3,
    "MODEL.SWIN.QK_SCALE": None,
    "TRAIN.START_EPOCH": 0,
}

_CHOICES = {
    "DATA.DATASET": ("imagenet",),
    "DATA.CACHE_MODE": ("no", "full", "part"),
    "DATA.UNREADABLE": ("error", "skip", "replace"),
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "random"),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step"),
    "TRAIN.OPTIMIZER.NAME": ("adamw", "sgd"),
    "AUG.REMODE": ("pixel", "rand", "const"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
    "TEST.PRECISION": ("fp32", "train"),
    "AMP_DTYPE": ("bf16", "fp16"),
}

# Key -> smallest and largest legal value.
_RANGES = {
    **dict.fromkeys(
        ("DATA.BATCH_SIZE", "DATA.IMG_SIZE", "MODEL.NUM_CLASSES", "TRAIN.EPOCHS", "PRINT_FREQ", "SAVE_FREQ"),
        (1, float("inf")),
    ),
    **dict.fromkeys(
        ("EVAL_FREQ", "KEEP_CHECKPOINTS", "AUG.RECOUNT", "AUG.REPEATS", "MODEL.SWIN.PATCH_SIZE"), (1, float("inf"))
    ),
    **dict.fromkeys(("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", "MODEL.SWIN.WINDOW_SIZE"), (1, float("inf"))),
    **dict.fromkeys(
        (
            "DATA.NUM_WORKERS",
            "DATA.MAX_UNREADABLE",
            "SAVE_STEPS",
            "TEST.BATCH_SIZE",
            "TRAIN.WARMUP_EPOCHS",
            "TRAIN.COOLDOWN_EPOCHS",
        ),
        (0, float("inf")),
    ),
    **dict.fromkeys(("TRAIN.BASE_LR", "TRAIN.WARMUP_LR", "TRAIN.MIN_LR", "TRAIN.WEIGHT_DECAY"), (0, float("inf"))),
    **dict.fromkeys(("TRAIN.CLIP_GRAD", "TRAIN.ACCUMULATION_STEPS", "AUG.MIXUP", "AUG.CUTMIX"), (0, float("inf"))),
    **dict.fromkeys(("AUG.HFLIP", "AUG.REPROB", "AUG.MIXUP_PROB", "AUG.MIXUP_SWITCH_PROB", "EMA.DECAY"), (0, 1)),
    "TRAIN.LAYER_DECAY": (1e-6, 1),
    "TRAIN.HEAD_LR_SCALE": (0, float("inf")),
    **dict.fromkeys(("DATA.GLOBAL_BATCH_SIZE", "TRAIN.RECIPE_BATCH_SIZE"), (0, float("inf"))),
    **dict.fromkeys(("MODEL.DROP_RATE", "MODEL.DROP_PATH_RATE", "MODEL.LABEL_SMOOTHING"), (0, 0.999)),
    "SEED": (0, 2**32 - 1),
    "MODEL.LA.KERNEL_SIZE": (1, float("inf")),
    "MODEL.LA.FOCUSING_FACTOR": (1, float("inf")),
    "AUG.COLOR_JITTER": (0, float("inf")),
    "TRAIN.OPTIMIZER.MOMENTUM": (0, 1),
}


def load_config(path: str | Path | Sequence[str | Path], opts: Sequence = ()) -> CfgNode:
    """The configuration of a run, completed, validated and frozen.

    Args:
        path: a YAML file; what it leaves out comes from its BASE files, then from the defaults. Or several, a model's and a
            recipe's, say: of what both give, the later one's holds.
        opts: key, value, key, value ... that override the file.

    Raises:
        ConfigError: unknown key, wrong type, illegal value, missing file or a circle of BASE files.
    """
    cfg = _defaults()
    for file in [path] if isinstance(path, (str, Path)) else path:
        _merge_file(cfg, Path(file), chain=())
    _merge_pairs(cfg, opts)
    cfg.BASE = [""]  # they are merged: the dump of this config stands alone
    _validate(cfg)
    cfg.freeze()
    return cfg


def flatten(cfg: Mapping, prefix: str = "") -> dict[str, object]:
    """Dotted key -> value, of every leaf."""
    leaves = {}
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def to_dict(cfg: Mapping) -> dict:
    """Plain nested dictionaries, as a checkpoint holds them."""
    return {key: to_dict(value) if isinstance(value, Mapping) else value for key, value in cfg.items()}


def _merge_file(cfg: CfgNode, path: Path, chain: tuple[Path, ...]) -> None:
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path}: a config is a YAML file; its name ends in .yaml or .yml")
    path = path.resolve()
    if path in chain:
        raise ConfigError(f"{path}: BASE files form a circle: {' -> '.join(str(p) for p in (*chain, path))}")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        asked = f" (BASE of {chain[-1]})" if chain else ""
        raise ConfigError(f"{path}{asked}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is no plain YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, not keys and values")
    bases = tree.pop("BASE", None) or []
    for base in [bases] if isinstance(bases, str) else bases:
        if base:
            _merge_file(cfg, path.parent / str(base), (*chain, path))
    for key, value in _leaves_of_file(tree, cfg, str(path)):
        _set(cfg, key, value, str(path))


def _leaves_of_file(tree: Mapping, node: CfgNode, source: str, prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        child = node.get(key)
        if isinstance(child, CfgNode):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{source}: {name}={value!r} is a section; give it keys: {', '.join(child)}")
            yield from _leaves_of_file(value, child, source, f"{name}.")
        else:
            yield name, value


def _merge_pairs(cfg: CfgNode, opts: Sequence) -> None:
    if len(opts) % 2:
        raise ConfigError(f"--opts: {opts[-1]!r} has no value; give KEY VALUE pairs")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        _set(cfg, str(key), value, "--opts")


def _set(cfg: CfgNode, key: str, value: object, source: str) -> None:
    *sections, leaf = key.split(".")
    node = cfg
    for section in sections:
        node = node.get(section) if isinstance(node, CfgNode) else None
    if not isinstance(node, CfgNode) or leaf not in node:
        if key in _REFERENCE_ONLY:
            if _literal(value) != _REFERENCE_ONLY[key]:
                raise ConfigError(f"{source}: {key}={value!r} has no effect here; remove it")
            return
        raise ConfigError(f"{source}: unknown key {key}{_nearest(key, cfg)}")
    if isinstance(node[leaf], CfgNode):
        raise ConfigError(f"{source}: {key} is a section; set one of its keys: {', '.join(node[leaf])}")
    node[leaf] = _convert(value, node[leaf], key, source)


def _nearest(key: str, cfg: CfgNode) -> str:
    known = list(flatten(cfg))
    # A wrong section with the right last name is nearer than anything spelt alike.
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    matches = get_close_matches(key, same_leaf or known, n=1, cutoff=0.0 if same_leaf else 0.4)
    return f": did you mean {matches[0]}?" if matches else ""


def _literal(value: object) -> object:
    """YAML leaves 5e-4, None and (1, 2) as text, and the command line leaves all as text: read it as Python does."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _convert(value: object, default: object, key: str, source: str) -> object:
    """``value`` in the type of the key's default."""
    literal = _literal(value)
    if isinstance(default, bool):
        if isinstance(literal, bool):
            return literal
    elif isinstance(default, str):
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return str(value)
    elif isinstance(default, int):
        if isinstance(literal, int) and not isinstance(literal, bool):
            return literal
    elif isinstance(default, float):
        if isinstance(literal, (int, float)) and not isinstance(literal, bool):
            return float(literal)
    elif literal is None and key in _MAY_BE_NONE:
        return None
    elif isinstance(literal, (list, tuple)):  # default: a list, or None where a list may stand
        kind = default[0] if default else 0.0
        return [_convert(item, kind, key, source) for item in literal]
    expected = "list" if default is None else type(default).__name__
    raise ConfigError(f"{source}: {key}={value!r} is {type(literal).__name__}; give {expected}, such as {default!r}")


_MAY_BE_NONE = ("AUG.CUTMIX_MINMAX",)


def _validate(cfg: CfgNode) -> None:
    leaves = flatten(cfg)
    for key, choices in _CHOICES.items():
        if leaves[key] not in choices:
            raise ConfigError(f"{key}={leaves[key]!r}: choose one of {', '.join(choices)}")
    for key, (low, high) in _RANGES.items():
        if not low <= leaves[key] <= high:
            raise ConfigError(f"{key}={leaves[key]!r}: give a number from {low} to {high}")
    for key in ("MODEL.NAME", "TAG"):
        if not leaves[key] or leaves[key] in (".", "..") or re.search(r"[/\\\0]", leaves[key]):
            raise ConfigError(f"{key}={leaves[key]!r}: it names a folder; give it a name without slashes")
    _validate_model(cfg)
    _validate_recipe(cfg)


def _validate_model(cfg: CfgNode) -> None:
    linear, swin_keys = cfg.MODEL.LA, cfg.MODEL.SWIN
    if linear.KERNEL_SIZE % 2 == 0:
        raise ConfigError(
            f"MODEL.LA.KERNEL_SIZE={linear.KERNEL_SIZE}: an even kernel changes the size of the token map; use an odd number"
        )
    if not re.fullmatch(r"[LS]+|(?=[LS]*M)[LSM]+\d+", linear.ATTN_TYPE):
        raise ConfigError(
            f"MODEL.LA.ATTN_TYPE={linear.ATTN_TYPE!r}: give a letter a stage, L (linear), S (softmax) or M with the "
            "number of linear blocks behind the letters, as in LLSS or LLMS3"
        )
    if not re.fullmatch(r"[1-9]{4}", linear.PVT_LA_SR_RATIOS):
        raise ConfigError(f"MODEL.LA.PVT_LA_SR_RATIOS={linear.PVT_LA_SR_RATIOS!r}: give a digit a stage, as in 8421")
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*){3}", linear.CSWIN_LA_SPLIT_SIZE):
        raise ConfigError(
            f"MODEL.LA.CSWIN_LA_SPLIT_SIZE={linear.CSWIN_LA_SPLIT_SIZE!r}: give a number a stage, as in 56-28-14-7"
        )
    if len(swin_keys.DEPTHS) != len(swin_keys.NUM_HEADS):
        raise ConfigError(
            f"MODEL.SWIN.DEPTHS={swin_keys.DEPTHS} and MODEL.SWIN.NUM_HEADS={swin_keys.NUM_HEADS}: "
            "both give a number a stage; make them equally long"
        )
    for stage, heads in enumerate(swin_keys.NUM_HEADS):
        if heads < 1 or swin_keys.EMBED_DIM * 2**stage % heads:
            raise ConfigError(
                f"MODEL.SWIN.NUM_HEADS={swin_keys.NUM_HEADS}: {heads} heads do not divide the "
                f"{swin_keys.EMBED_DIM * 2**stage} channels of stage {stage + 1}; change it or MODEL.SWIN.EMBED_DIM"
            )


def _validate_recipe(cfg: CfgNode) -> None:
    if cfg.TRAIN.WARMUP_EPOCHS > cfg.TRAIN.EPOCHS:
        raise ConfigError(
            f"TRAIN.WARMUP_EPOCHS={cfg.TRAIN.WARMUP_EPOCHS}: longer than TRAIN.EPOCHS={cfg.TRAIN.EPOCHS}; lower it"
        )
    if cfg.DATA.GLOBAL_BATCH_SIZE and cfg.TRAIN.ACCUMULATION_STEPS > 1:
        raise ConfigError(
            f"TRAIN.ACCUMULATION_STEPS={cfg.TRAIN.ACCUMULATION_STEPS}: follows from DATA.GLOBAL_BATCH_SIZE="
            f"{cfg.DATA.GLOBAL_BATCH_SIZE}; give one of them"
        )
    if cfg.TRAIN.FREEZE_BACKBONE and cfg.TRAIN.LAYER_DECAY < 1:
        raise ConfigError(
            f"TRAIN.LAYER_DECAY={cfg.TRAIN.LAYER_DECAY}: has no effect with TRAIN.FREEZE_BACKBONE, which trains the head "
            "alone; remove one of them"
        )
    for key in ("MEAN", "STD"):
        if len(cfg.DATA[key]) != 3 or (key == "STD" and min(cfg.DATA[key]) <= 0):
            raise ConfigError(f"DATA.{key}={cfg.DATA[key]}: give three numbers, deviations above 0")
    for key in ("SCALE", "RATIO"):
        if len(cfg.AUG[key]) != 2 or not 0 < cfg.AUG[key][0] <= cfg.AUG[key][1]:
            raise ConfigError(f"AUG.{key}={cfg.AUG[key]}: give the smallest and the largest, above 0")
    if cfg.AUG.CUTMIX_MINMAX is not None and len(cfg.AUG.CUTMIX_MINMAX) != 2:
        raise ConfigError(f"AUG.CUTMIX_MINMAX={cfg.AUG.CUTMIX_MINMAX}: give the smallest and the largest share, or None")
    betas = cfg.TRAIN.OPTIMIZER.BETAS
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"TRAIN.OPTIMIZER.BETAS={betas}: give two numbers of at least 0 and below 1")
    if cfg.MODEL.RESUME and cfg.MODEL.PRETRAINED:
        raise ConfigError(
            f"MODEL.RESUME={cfg.MODEL.RESUME} and MODEL.PRETRAINED={cfg.MODEL.PRETRAINED}: a resumed run has its "
            "weights already; give one of --resume and --pretrained"
        )
