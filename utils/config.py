"""Configuration: defaults, BASE files, a file, the command line, in this order; then checked and frozen.

Every key, its default and its meaning stand in ``_defaults``, once.
"""

import ast
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    cfg.DATA.IMG_SIZE = 224  # input size in pixels: one number for a square, or [height, width]
    cfg.DATA.INTERPOLATION = "bicubic"  # of resizing: bicubic, bilinear, or random (in training; evaluation: bilinear)
    cfg.DATA.MEAN = IMAGENET_MEAN  # per channel, of values in [0, 1]
    cfg.DATA.STD = IMAGENET_STD  # likewise
    cfg.DATA.NUM_WORKERS = 8  # loader processes per training process; at most its share of the machine's cores is used
    cfg.DATA.WORKER_TIMEOUT = 30.0  # seconds after which a loader worker without a batch is an error; 0 to wait for ever
    cfg.DATA.PIN_MEMORY = True  # page-locked batches, for faster copies to a GPU

    cfg.MODEL = CfgNode()
    cfg.MODEL.TYPE = "flatten_swin"  # the family, see models/registry.py
    cfg.MODEL.NAME = "flatten_swin_t"  # names the run's folder
    cfg.MODEL.NUM_CLASSES = 1000  # number of classes; must be that of the data
    cfg.MODEL.DROP_RATE = 0.0  # dropout of embeddings, projections and MLPs
    cfg.MODEL.DROP_PATH_RATE = 0.1  # stochastic depth of the last block; grows from 0 over the network
    cfg.MODEL.LABEL_SMOOTHING = 0.1  # share of the target given to all classes alike
    cfg.MODEL.RESUME = ""  # checkpoint to resume from, or to evaluate: a file, a run's folder, a URL or a released model's name
    cfg.MODEL.PRETRAINED = ""  # checkpoint whose weights training starts from; given like RESUME (--pretrained)

    cfg.MODEL.SWIN = CfgNode()
    cfg.MODEL.SWIN.PATCH_SIZE = 4  # pixels
    cfg.MODEL.SWIN.EMBED_DIM = 96  # channels of the first stage; each next one has twice as many
    cfg.MODEL.SWIN.DEPTHS = [2, 2, 6, 2]  # blocks of each stage
    cfg.MODEL.SWIN.NUM_HEADS = [3, 6, 12, 24]  # of each stage
    cfg.MODEL.SWIN.WINDOW_SIZE = 7  # of linear blocks, capped at the map; softmax blocks: 7, or 12 where this is > 56
    cfg.MODEL.SWIN.MLP_RATIO = 4.0  # hidden over outer channels
    cfg.MODEL.SWIN.QKV_BIAS = True  # the projections to q, k and v have biases
    cfg.MODEL.SWIN.PATCH_NORM = True  # norm after the patch embedding

    cfg.MODEL.DEIT = CfgNode()  # for MODEL.TYPE flatten_deit; flatten_deit_t, _s and _b have sizes of their own
    cfg.MODEL.DEIT.PATCH_SIZE = 16  # pixels
    cfg.MODEL.DEIT.EMBED_DIM = 192  # channels of every block
    cfg.MODEL.DEIT.DEPTH = 12  # number of blocks
    cfg.MODEL.DEIT.NUM_HEADS = 3  # attention heads of every block; must divide EMBED_DIM

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
    cfg.TRAIN.RECIPE_BATCH_SIZE = 0  # images per update that the recipe was made for; 0: 8 processes of the file's BATCH_SIZE
    cfg.TRAIN.WARMUP_LR = 5e-7  # at the first update
    cfg.TRAIN.MIN_LR = 5e-6  # at the end
    cfg.TRAIN.WEIGHT_DECAY = 0.05  # of matrices and kernels; norms, biases and relative-position tables have none
    cfg.TRAIN.LAYER_DECAY = 1.0  # a layer's learning rate over that of the layer behind it; 1: all have the same
    cfg.TRAIN.HEAD_LR_SCALE = 1.0  # the head's learning rate over what it would be
    cfg.TRAIN.FREEZE_BACKBONE = False  # train the head alone (linear probe), on features as in evaluation
    cfg.TRAIN.CLIP_GRAD = 5.0  # maximum L2 norm of all gradients together; None or 0: no clipping
    cfg.TRAIN.ACCUMULATION_STEPS = 0  # forward passes per update; 0 and 1 mean one
    cfg.TRAIN.USE_CHECKPOINT = False  # recompute activations to save memory (--use-checkpoint)
    cfg.TRAIN.COMPILE = False  # torch.compile
    cfg.TRAIN.AUTO_RESUME = True  # go on from the newest checkpoint of the output folder

    cfg.TRAIN.LR_SCHEDULER = CfgNode()
    cfg.TRAIN.LR_SCHEDULER.NAME = "cosine"  # cosine (to MIN_LR), linear (to 1 % of BASE_LR, as the reference) or step
    cfg.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30  # step: epochs between two decays
    cfg.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1  # step: factor of each decay, in (0, 1]

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
    cfg.AUG.MIXUP_MODE = "batch"  # batch, pair or elem; pair and elem mix image by image, which is slow on a GPU

    cfg.EMA = CfgNode()
    cfg.EMA.ENABLED = False  # keep and evaluate an average of the weights (--model-ema, --no-model-ema)
    cfg.EMA.DECAY = 0.9999  # per update (--model-ema-decay)
    cfg.EMA.FORCE_CPU = False  # keep it in host memory (--model-ema-force-cpu)

    cfg.TEST = CfgNode()
    cfg.TEST.CROP = True  # the reference's switch: False means CROP_MODE none
    cfg.TEST.CROP_MODE = "squash"  # resize to IMG_SIZE / CROP_PCT, then centre crop: squash (both sides, whatever the image's
    # aspect ratio; published numbers were measured so) or short (the shorter side, keeping it); none: resize to IMG_SIZE
    cfg.TEST.CROP_PCT = 0.875  # share of the resized image's side that the centre crop keeps, as in timm; in (0, 1]
    cfg.TEST.INTERPOLATION = ""  # bicubic or bilinear; "": as DATA.INTERPOLATION
    cfg.TEST.BATCH_SIZE = 0  # images per process; 0 for DATA.BATCH_SIZE
    cfg.TEST.CLASS_MAP = ""  # --eval on other classes than the model's: imagenet for -A, -R, -V2 and -Sketch, or a file
    cfg.TEST.REAL_LABELS = ""  # --eval with ImageNet's ReaL labels too: their real.json
    cfg.TEST.PREDICTIONS = False  # --eval writes every image's answer too, for scripts/compare_evals.py
    cfg.TEST.PRECISION = "fp32"  # fp32, or train for the precision of training

    cfg.AMP = False  # mixed precision in training (--amp)
    cfg.AMP_DTYPE = "bf16"  # bf16, or fp16 with a loss scaler
    cfg.OUTPUT = "output"  # runs go to <OUTPUT>/<MODEL.NAME>/<TAG>
    cfg.TAG = "default"  # names the run (--tag)
    cfg.DETERMINISTIC = "off"  # deterministic algorithms: off, warn (where an operation has none) or error
    cfg.TF32 = True  # compute fp32 products and convolutions on GPUs in TF32, as torch 1.11 did: faster, 10 bits of mantissa
    cfg.CUDNN_BENCHMARK = True  # let cuDNN time its algorithms for each new shape; without effect with DETERMINISTIC
    cfg.SEED = 0  # of weights, order, augmentation, mixing and drop path
    cfg.COLLECTIVE_TIMEOUT = 600.0  # seconds after which a process that the others wait for is an error
    cfg.PRINT_FREQ = 10  # updates between log lines
    cfg.SAVE_FREQ = 1  # epochs between checkpoints
    cfg.SAVE_STEPS = 0  # updates between checkpoints within an epoch; 0 for none
    cfg.SAVE_MINUTES = 15.0  # minutes after the last checkpoint at which another one is saved within an epoch; 0 for none
    cfg.EVAL_FREQ = 1  # epochs between evaluations
    cfg.ATTENTION_IMAGE = ""  # image; TensorBoard shows the raw weights' attention to it after each evaluation; "" for none
    cfg.KEEP_CHECKPOINTS = 2  # newest checkpoints to keep, beside the best
    return cfg


# Keys of the reference that have no effect here; accepted at their default value and ignored.
_REFERENCE_ONLY = {
    "AMP_OPT_LEVEL": "",
    "EVAL_MODE": False,
    "THROUGHPUT_MODE": False,
    "LOCAL_RANK": 0,
    "MODEL.SWIN.APE": False,
    "MODEL.SWIN.DEPTHS_LR": [2, 2, 2, 2],
    "MODEL.SWIN.IN_CHANS": 3,
    "MODEL.SWIN.QK_SCALE": None,
    "TRAIN.START_EPOCH": 0,
}

MODEL_TYPES = (
    "flatten_swin",
    *(f"flatten_pvt_{size}" for size in ("tiny", "small", "medium", "large")),
    *(f"flatten_pvt_v2_b{size}" for size in range(6)),
    "FLatten_CSWin_64_24181_tiny_224",
    "FLatten_CSWin_64_24322_small_224",
    "FLatten_CSWin_96_36292_base_224",
    "FLatten_CSWin_96_36292_base_384",
    "flatten_deit",
    *(f"flatten_deit_{size}" for size in "tsb"),
)
# Beginning of a key -> the values of MODEL.TYPE that read it. Other types reject a value that is not the default.
_FAMILY_KEYS = {
    "MODEL.SWIN.": ("flatten_swin",),
    "MODEL.DEIT.": ("flatten_deit",),
    "MODEL.LA.PVT_LA_SR_RATIOS": tuple(name for name in MODEL_TYPES if name.startswith("flatten_pvt")),
    "MODEL.LA.CSWIN_LA_SPLIT_SIZE": tuple(name for name in MODEL_TYPES if name.startswith("FLatten_CSWin")),
}
# Keys that hold a path: ~ is expanded.
_PATHS = ("DATA.DATA_PATH", "DATA.INDEX_CACHE", "MODEL.RESUME", "MODEL.PRETRAINED", "OUTPUT", "ATTENTION_IMAGE")
_PATHS += ("TEST.CLASS_MAP", "TEST.REAL_LABELS")
# What people type -> the key that they mean.
_ALIASES = {
    "LR": "TRAIN.BASE_LR",
    "LEARNING_RATE": "TRAIN.BASE_LR",
    "WD": "TRAIN.WEIGHT_DECAY",
    "WORKERS": "DATA.NUM_WORKERS",
    "NUM_WORKERS": "DATA.NUM_WORKERS",
    "CLASSES": "MODEL.NUM_CLASSES",
    "INPUT_SIZE": "DATA.IMG_SIZE",
    "RESOLUTION": "DATA.IMG_SIZE",
    "DROP_PATH": "MODEL.DROP_PATH_RATE",
    "SMOOTHING": "MODEL.LABEL_SMOOTHING",
    "CLIP": "TRAIN.CLIP_GRAD",
}

_CHOICES = {
    "MODEL.TYPE": MODEL_TYPES,
    "MODEL.LA.KIND": ("focused", "relu", "efficient", "hydra", "angular", "enhanced", "softmax"),
    "DATA.DATASET": ("imagenet",),
    "TEST.CROP_MODE": ("squash", "short", "none"),
    "TEST.INTERPOLATION": ("", "bicubic", "bilinear"),
    "DATA.CACHE_MODE": ("no", "full", "part"),
    "DATA.UNREADABLE": ("error", "skip", "replace"),
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "random"),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step"),
    "TRAIN.OPTIMIZER.NAME": ("adamw", "sgd"),
    "AUG.REMODE": ("pixel", "rand", "const"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
    "TEST.PRECISION": ("fp32", "train"),
    "AMP_DTYPE": ("bf16", "fp16"),
    "DETERMINISTIC": ("off", "warn", "error"),
}

# Key -> smallest and largest legal value.
_RANGES = {
    **dict.fromkeys(
        ("DATA.BATCH_SIZE", "MODEL.NUM_CLASSES", "TRAIN.EPOCHS", "PRINT_FREQ", "SAVE_FREQ"),
        (1, float("inf")),
    ),
    **dict.fromkeys(
        ("EVAL_FREQ", "KEEP_CHECKPOINTS", "AUG.RECOUNT", "AUG.REPEATS", "MODEL.SWIN.PATCH_SIZE"), (1, float("inf"))
    ),
    **dict.fromkeys(("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", "MODEL.SWIN.WINDOW_SIZE"), (1, float("inf"))),
    **dict.fromkeys((f"MODEL.DEIT.{key}" for key in ("PATCH_SIZE", "EMBED_DIM", "DEPTH", "NUM_HEADS")), (1, float("inf"))),
    **dict.fromkeys(
        (
            "DATA.NUM_WORKERS",
            "DATA.MAX_UNREADABLE",
            "SAVE_STEPS",
            "SAVE_MINUTES",
            "DATA.WORKER_TIMEOUT",
            "TEST.BATCH_SIZE",
            "TRAIN.WARMUP_EPOCHS",
            "TRAIN.COOLDOWN_EPOCHS",
        ),
        (0, float("inf")),
    ),
    **dict.fromkeys(("TRAIN.BASE_LR", "TRAIN.WARMUP_LR", "TRAIN.MIN_LR", "TRAIN.WEIGHT_DECAY"), (0, float("inf"))),
    **dict.fromkeys(("TRAIN.CLIP_GRAD", "TRAIN.ACCUMULATION_STEPS", "AUG.MIXUP", "AUG.CUTMIX"), (0, float("inf"))),
    **dict.fromkeys(("AUG.HFLIP", "AUG.REPROB", "AUG.MIXUP_PROB", "AUG.MIXUP_SWITCH_PROB", "EMA.DECAY"), (0, 1)),
    "COLLECTIVE_TIMEOUT": (1, 86400),
    "TRAIN.LAYER_DECAY": (1e-6, 1),
    "TRAIN.HEAD_LR_SCALE": (0, float("inf")),
    **dict.fromkeys(("DATA.GLOBAL_BATCH_SIZE", "TRAIN.RECIPE_BATCH_SIZE"), (0, float("inf"))),
    **dict.fromkeys(("MODEL.DROP_RATE", "MODEL.DROP_PATH_RATE", "MODEL.LABEL_SMOOTHING"), (0, 0.999)),
    "SEED": (0, 2**32 - 1),
    "MODEL.LA.KERNEL_SIZE": (1, float("inf")),
    "MODEL.LA.FOCUSING_FACTOR": (1, float("inf")),
    "AUG.COLOR_JITTER": (0, float("inf")),
    "TRAIN.OPTIMIZER.MOMENTUM": (0, 1),
    "TRAIN.OPTIMIZER.EPS": (0, float("inf")),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": (1e-9, 1),
    "TEST.CROP_PCT": (0.01, 1),
    "MODEL.SWIN.EMBED_DIM": (1, float("inf")),
    "MODEL.SWIN.MLP_RATIO": (0.01, float("inf")),
}
LONGEST_NAME = 255  # bytes of a file's name
REFERENCE_PROCESSES = 8  # GPUs that the reference's recipes were made for


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
    return _complete(cfg, opts)


def load_stored_config(tree: Mapping, opts: Sequence = (), *, source: str, sections: Sequence[str] = ()) -> CfgNode:
    """The configuration that a checkpoint carries, completed, validated and frozen.

    Keys that are unknown here (of another version or of the reference) are ignored. RESUME and PRETRAINED are emptied:
    they describe how that run began.

    Args:
        tree: nested dictionaries.
        opts: key, value, key, value ... that override them.
        source: file, for messages.
        sections: beginnings of the keys to take; none given: all.

    Raises:
        ConfigError: an illegal value.
    """
    cfg = _defaults()
    known = flatten(cfg).keys() - {"BASE", "MODEL.RESUME", "MODEL.PRETRAINED"}
    for key, value in flatten(tree).items():
        if key in known and key.startswith(tuple(sections) or ""):
            _set(cfg, key, value, source)
    return _complete(cfg, opts)


def _complete(cfg: CfgNode, opts: Sequence) -> CfgNode:
    if cfg.TRAIN.RECIPE_BATCH_SIZE == 0:  # before the command line: it is the file's batch that the recipe was made for
        cfg.TRAIN.RECIPE_BATCH_SIZE = REFERENCE_PROCESSES * cfg.DATA.BATCH_SIZE
    _merge_pairs(cfg, opts)
    cfg.BASE = [""]  # BASE files are merged: the dump of this config stands alone
    for key in _PATHS:
        section, _, leaf = key.rpartition(".")
        node = _section(cfg, section)
        node[leaf] = os.path.expanduser(node[leaf])
    _validate(cfg)
    cfg.freeze()
    return cfg


def _section(cfg: CfgNode, dotted: str) -> CfgNode:
    for name in filter(None, dotted.split(".")):
        cfg = cfg[name]
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


class _UniqueKeyLoader(yaml.SafeLoader):
    """Plain YAML; a key given twice in one section is an error, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _merge_file(cfg: CfgNode, path: Path, chain: tuple[Path, ...]) -> None:
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path}: a config is a YAML file; its name ends in .yaml or .yml")
    path = path.resolve()
    if path in chain:
        raise ConfigError(f"{path}: BASE files form a circle: {' -> '.join(str(p) for p in (*chain, path))}")
    try:
        tree = yaml.load(path.read_text(), _UniqueKeyLoader) or {}
    except OSError as error:
        asked = f" (BASE of {chain[-1]})" if chain else ""
        raise ConfigError(f"{path}{asked}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is no plain YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, not keys and values")
    bases = tree.pop("BASE", None) or []
    if not isinstance(bases, (str, list)):
        raise ConfigError(f"{path}: BASE={bases!r}: give a file, or a list of files")
    for base in [bases] if isinstance(bases, str) else bases:
        if base:
            _merge_file(cfg, path.parent / os.path.expanduser(str(base)), (*chain, path))
    for key, value in _leaves_of_file(tree, cfg, str(path)):
        _set(cfg, key, value, str(path))


def _leaves_of_file(tree: Mapping, node: CfgNode, source: str, prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if "." in str(key):
            raise ConfigError(f"{source}: {name}: write it as a section and a key, {str(key).replace('.', ': {')}: ...}}")
        child = node.get(key)
        if isinstance(child, CfgNode):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{source}: {name}={value!r} is a section; give it keys: {', '.join(child)}")
            yield from _leaves_of_file(value, child, source, f"{name}.")
        else:
            yield name, value


def _merge_pairs(cfg: CfgNode, opts: Sequence) -> None:
    known = flatten(cfg)
    for key, value in _pairs(opts):
        if isinstance(value, str) and value in known:
            raise ConfigError(f"--opts: {key!r} has no value: the next word is the key {value}; give KEY VALUE pairs")
        _set(cfg, key, value, "--opts")


def option_keys(opts: Sequence) -> set[str]:
    """The keys among ``KEY VALUE`` or ``KEY=VALUE`` pairs."""
    return {key for key, _ in _pairs(opts)}


def _pairs(opts: Sequence) -> Iterator[tuple[str, object]]:
    words = list(opts)
    while words:
        key, joined, value = str(words.pop(0)).partition("=")
        if not joined:
            if not words:
                raise ConfigError(f"--opts: {key!r} has no value; give KEY VALUE or KEY=VALUE pairs")
            value = words.pop(0)
        yield key, value


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
    known = {name.upper(): name for name in flatten(cfg)}
    asked = key.upper().lstrip("-").replace("-", "_")
    leaf = asked.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    if leaf in _ALIASES and not same_leaf:
        return f": did you mean {_ALIASES[leaf]}?"
    # A wrong section with the right last name is nearer than anything with a similar spelling.
    matches = get_close_matches(asked, same_leaf or known, n=1, cutoff=0.0 if same_leaf else 0.4)
    return f": did you mean {known[matches[0]]}?" if matches else ""


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
    if literal is None and key in _MAY_BE_NONE:
        return None
    if key in _MAY_BE_PAIR and isinstance(literal, (list, tuple)):
        return [_convert(item, 0, key, source) for item in literal]
    if isinstance(default, list) and key in _MAY_BE_PAIR:
        default = 0  # an earlier file gave a pair
    if isinstance(default, bool):
        if isinstance(literal, bool):
            return literal
    elif isinstance(default, str):
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return str(value)
    elif isinstance(default, int):
        if isinstance(literal, int) and not isinstance(literal, bool):
            return literal
    elif isinstance(default, float) or key == "TRAIN.CLIP_GRAD":
        if isinstance(literal, (int, float)) and not isinstance(literal, bool):
            return float(literal)
    elif isinstance(literal, (list, tuple)):  # default: a list, or None where a list may stand
        kind = default[0] if default else 0.0
        return [_convert(item, kind, key, source) for item in literal]
    expected = "list" if default is None else type(default).__name__
    raise ConfigError(f"{source}: {key}={value!r} is {type(literal).__name__}; give {expected}, such as {default!r}")


_MAY_BE_NONE = ("AUG.CUTMIX_MINMAX", "TRAIN.CLIP_GRAD")
_MAY_BE_PAIR = ("DATA.IMG_SIZE",)


def _validate(cfg: CfgNode) -> None:
    leaves = flatten(cfg)
    for key, choices in _CHOICES.items():
        if leaves[key] not in choices:
            near = get_close_matches(leaves[key], choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{key}={leaves[key]!r}: choose one of {', '.join(filter(None, choices))}{hint}")
    for key, (low, high) in _RANGES.items():
        if leaves[key] is not None and not low <= leaves[key] <= high:
            raise ConfigError(f"{key}={leaves[key]!r}: give a number from {low} to {high}")
    for key in ("MODEL.NAME", "TAG"):
        if not leaves[key] or leaves[key] in (".", "..") or re.search(r"[/\\\0]", leaves[key]):
            raise ConfigError(f"{key}={leaves[key]!r}: it names a folder; give it a name without slashes")
        if len(os.fsencode(leaves[key])) > LONGEST_NAME:
            raise ConfigError(f"{key}={leaves[key]!r}: names a folder; give it at most {LONGEST_NAME} bytes")
    _validate_sizes(cfg)
    _validate_model(cfg)
    _validate_recipe(cfg)


def image_size(cfg: CfgNode) -> tuple[int, int]:
    """DATA.IMG_SIZE as (height, width)."""
    size = cfg.DATA.IMG_SIZE
    return (size, size) if isinstance(size, int) else tuple(size)


def _validate_sizes(cfg: CfgNode) -> None:
    size = cfg.DATA.IMG_SIZE
    if (not isinstance(size, int) and len(size) != 2) or min(image_size(cfg)) < 1:
        raise ConfigError(f"DATA.IMG_SIZE={size}: give one number of pixels, or [height, width]")
    if not cfg.TEST.CROP and cfg.TEST.CROP_MODE == "short":
        raise ConfigError("TEST.CROP=False: means TEST.CROP_MODE none, but TEST.CROP_MODE=short; give one of them")


def _validate_model(cfg: CfgNode) -> None:
    linear, swin_keys, deit_keys = cfg.MODEL.LA, cfg.MODEL.SWIN, cfg.MODEL.DEIT
    defaults = flatten(_defaults())
    for key, value in flatten(cfg).items():
        types = next((types for start, types in _FAMILY_KEYS.items() if key.startswith(start)), MODEL_TYPES)
        if cfg.MODEL.TYPE not in types and value != defaults[key]:
            raise ConfigError(f"{key}={value!r}: has no effect with MODEL.TYPE={cfg.MODEL.TYPE}; remove it")
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
    if not swin_keys.DEPTHS or min(swin_keys.DEPTHS) < 1:
        raise ConfigError(f"MODEL.SWIN.DEPTHS={swin_keys.DEPTHS}: give the number of blocks per stage, each at least 1")
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
    if deit_keys.EMBED_DIM % deit_keys.NUM_HEADS:
        raise ConfigError(
            f"MODEL.DEIT.NUM_HEADS={deit_keys.NUM_HEADS}: does not divide MODEL.DEIT.EMBED_DIM={deit_keys.EMBED_DIM}; "
            "change one of them"
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
    minmax = cfg.AUG.CUTMIX_MINMAX
    if minmax is not None and not (len(minmax) == 2 and 0 < minmax[0] < minmax[1] <= 1):
        raise ConfigError(f"AUG.CUTMIX_MINMAX={minmax}: give [smallest, largest], 0 < smallest < largest <= 1, or None")
    betas = cfg.TRAIN.OPTIMIZER.BETAS
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"TRAIN.OPTIMIZER.BETAS={betas}: give two numbers of at least 0 and below 1")
    if cfg.MODEL.RESUME and cfg.MODEL.PRETRAINED:
        raise ConfigError(
            f"MODEL.RESUME={cfg.MODEL.RESUME} and MODEL.PRETRAINED={cfg.MODEL.PRETRAINED}: a resumed run has its "
            "weights already; give one of --resume and --pretrained"
        )
