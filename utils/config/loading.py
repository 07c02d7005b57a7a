"""Load the configuration of a run.

Defaults, BASE files, config files and command line are merged in this order, so that later ones override earlier ones. The
result is validated and frozen. ``utils.config.keys`` defines the keys.
"""

import ast
import copy
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml
from yacs.config import CfgNode

from utils.config.keys import INFINITY, KEYS, MODEL_TYPES
from utils.urls import conceal


class ConfigError(ValueError):
    """An invalid setting. The message has the key, the value and the remedy."""


def _defaults() -> CfgNode:
    cfg = CfgNode()
    for name, key in KEYS.items():
        *sections, leaf = name.split(".")
        node = cfg
        for section in sections:
            node = node.setdefault(section, CfgNode())
        node[leaf] = copy.copy(key.default)
    return cfg


# Keys of the reference implementation (the authors' code) that have no effect here -> their default, the only legal value.
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

# Key prefix -> model types that use the keys with this prefix. With other types, these keys must have their default values.
_FAMILY_KEYS = {
    "MODEL.SWIN.": ("flatten_swin",),
    "MODEL.DEIT.": ("flatten_deit",),
    "MODEL.LA.PVT_LA_SR_RATIOS": tuple(name for name in MODEL_TYPES if name.startswith("flatten_pvt")),
    "MODEL.LA.CSWIN_LA_SPLIT_SIZE": tuple(name for name in MODEL_TYPES if name.startswith("FLatten_CSWin")),
}
# Name of a key in other projects -> key of this project.
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

MAX_NAME_BYTES = 255  # maximum length of a file name on common file systems
MAX_FILE_BYTES = 2**20  # maximum size of a config file
MAX_TEXT = 4096  # maximum length of a value
MAX_INT = 2**63  # exclusive maximum of an integer
MAX_LIST = 16  # maximum length of a list
MAX_DEPTH = 16  # maximum nesting of lists and sections in a config file
MAX_ITEMS = 10_000  # maximum number of values in a config file; aliases count each time
REFERENCE_PROCESSES = 8  # number of GPUs in the recipes of the reference implementation


def load_config(path: str | Path | Sequence[str | Path], opts: Sequence = ()) -> CfgNode:
    """Load the configuration of a run, completed with defaults, validated and frozen.

    Args:
        path: one or more YAML files, such as a model's and a recipe's; later files override earlier ones. Missing keys come
            from the BASE files, then from the defaults.
        opts: KEY, VALUE, ... or KEY=VALUE, ...; they override the files.

    Raises:
        ConfigError: unknown key, wrong type, illegal value, missing file or cyclic BASE files.
    """
    cfg = _defaults()
    for file in [path] if isinstance(path, (str, Path)) else path:
        _merge_file(cfg, Path(file), chain=())
    return _complete(cfg, opts)


def load_stored_config(tree: Mapping, opts: Sequence = (), *, source: str, sections: Sequence[str] = ()) -> CfgNode:
    """Load the configuration stored in a checkpoint, completed with defaults, validated and frozen.

    Unknown keys (from another version or the reference implementation) are ignored. MODEL.RESUME and MODEL.PRETRAINED are
    cleared, since they apply only to the start of the run that wrote the checkpoint.

    Args:
        tree: the stored configuration as nested dictionaries.
        opts: KEY, VALUE, ... or KEY=VALUE, ...; they override the stored values.
        source: file name, for messages.
        sections: prefixes of the keys to read; () reads all keys.

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
    if cfg.TRAIN.RECIPE_BATCH_SIZE == 0:  # computed before --opts is applied, which may change DATA.BATCH_SIZE
        cfg.TRAIN.RECIPE_BATCH_SIZE = REFERENCE_PROCESSES * cfg.DATA.BATCH_SIZE
    _merge_pairs(cfg, opts)
    cfg.BASE = [""]  # BASE files are merged; loading a dump of this config must not merge them again
    for name in (name for name, key in KEYS.items() if key.is_path):
        section, _, leaf = name.rpartition(".")
        node = _section(cfg, section)
        # Only the request for a download uses the secrets of a URL, so that no copy of the config contains them.
        node[leaf] = conceal(os.path.expanduser(node[leaf]))
    _validate(cfg)
    cfg.freeze()
    return cfg


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = 20
        self.maxdict = self.maxset = 10
        self.maxstring = self.maxother = self.maxlong = 200

    def repr_int(self, value: int, level: int) -> str:  # Python refuses to print integers of more than 4300 digits
        return repr(value) if abs(value) < MAX_INT else f"an integer of {value.bit_length()} bits"


def show(value: object) -> str:
    """Short ``repr`` of a value, for messages: values of a file may be large or contain themselves."""
    return _Repr().repr(value)


def _section(cfg: CfgNode, dotted_name: str) -> CfgNode:
    for name in filter(None, dotted_name.split(".")):
        cfg = cfg[name]
    return cfg


def flatten(cfg: Mapping, prefix: str = "") -> dict[str, object]:
    """Flatten nested sections into one dictionary with dotted keys."""
    leaves = {}
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def to_dict(cfg: Mapping) -> dict:
    """Convert to plain nested dictionaries, as stored in checkpoints."""
    return {key: to_dict(value) if isinstance(value, Mapping) else value for key, value in cfg.items()}


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML loader that rejects duplicate keys; PyYAML would silently use the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if duplicates := [name for name, count in Counter(names).items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {duplicates[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Replace merge keys (<<) by what they refer to, which can grow exponentially."""
        super().flatten_mapping(node)
        if len(node.value) > MAX_ITEMS:
            raise yaml.constructor.ConstructorError(None, None, f"merge keys give more than {MAX_ITEMS} keys", node.start_mark)


def _read_yaml(path: Path, origin: str) -> dict:
    """Read a config file as nested dictionaries with text as keys.

    Args:
        origin: the file that refers to this one, for messages; "" if there is none.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is not a small tree of sections, lists and values.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}{origin} cannot be read: {error.strerror}{_suggest_file(path)}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has more than {MAX_FILE_BYTES} bytes, which is too large for a config; give a config file")
    try:
        tree = yaml.load(content.decode("utf-8-sig"), _UniqueKeyLoader)
    except RecursionError:
        raise ConfigError(
            f"{path} cannot be parsed as YAML: it is nested too deeply; write at most {MAX_DEPTH} levels"
        ) from None
    except Exception as error:  # PyYAML raises many exception types, such as ValueError for an impossible date
        raise ConfigError(f"{path} cannot be parsed as YAML: {' '.join(str(error).split())}; correct the file") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} is of type {type(tree).__name__}, not a mapping; give keys and values")
    _check_tree(tree, path)
    return tree


def _check_tree(tree: dict, path: Path) -> None:
    """Check the structure of a config file. Aliases can make a small file infinitely deep, or exponentially large.

    Raises:
        ConfigError: too many levels or values, or a key that is not text.
    """
    pending, num_items = [(tree, "", 0)], 0
    while pending:
        node, name, depth = pending.pop()
        num_items += len(node)
        if depth > MAX_DEPTH or num_items > MAX_ITEMS:
            raise ConfigError(
                f"{path}: {name[:200]} has more than {MAX_DEPTH} levels or makes the config larger than {MAX_ITEMS} values; "
                "write the values without aliases"
            )
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(node, dict) and not isinstance(key, str):
                raise ConfigError(f"{path}: the key {show(key)} is not text; config keys are names, such as MODEL")
            if isinstance(value, (dict, list, tuple, set)):
                pending.append((value, f"{name}.{key}".lstrip("."), depth + 1))


def _merge_file(cfg: CfgNode, path: Path, chain: tuple[Path, ...]) -> None:
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path} is not a YAML file; give a config whose name ends in .yaml or .yml{_suggest_file(path)}")
    try:
        path = Path(os.path.realpath(path))
    except ValueError as error:  # a null character
        raise ConfigError(f"{str(path)!r} is not a path ({error}); correct BASE in {chain[-1]}") from None
    if path in chain:
        raise ConfigError(f"{path}: BASE files form a cycle: {' -> '.join(str(p) for p in (*chain, path))}")
    tree = _read_yaml(path, f" (BASE of {chain[-1]})" if chain else "")
    bases = tree.pop("BASE", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) and len(base) <= MAX_TEXT for base in bases):
        raise ConfigError(f"{path}: BASE={show(bases)}: give a file, or a list of files")
    for base in bases:
        if base:
            _merge_file(cfg, path.parent / os.path.expanduser(base), (*chain, path))
    for key, value in _leaves_of_file(tree, cfg, str(path)):
        _set(cfg, key, value, str(path))


def _suggest_file(path: Path) -> str:
    """Suggest the config of the most similar name at the end of an error; "" if ``path`` exists, or if no name is similar."""
    if os.path.exists(path):
        return ""
    try:
        names = sorted(file.name for file in path.parent.glob("[!.]*.yaml"))
    except OSError:  # the path is too long
        return ""
    near = get_close_matches(f"{path.stem}.yaml", names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _leaves_of_file(tree: Mapping, node: CfgNode, source: str, prefix: str = "") -> Iterable[tuple[str, object]]:
    """Yield every key of a config file with its value; sections and keys are joined by dots.

    Args:
        tree: a section of the file.
        node: the same section of the default config.
        source: file name, for messages.
        prefix: name of the section, with a final dot.
    """
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if "." in str(key):
            *sections, leaf = str(key).split(".")
            nested = "".join(f"{section}: {{" for section in sections) + f"{leaf}: ..." + "}" * len(sections)
            raise ConfigError(f"{source}: the key {name} contains a dot; write {nested} instead")
        child = node.get(key)
        if isinstance(child, CfgNode):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{source}: {name}={show(value)} assigns a value to a section; set its keys: {', '.join(child)}"
                )
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
    """Keys of ``KEY VALUE`` or ``KEY=VALUE`` pairs."""
    return {key for key, _ in _pairs(opts)}


def _pairs(opts: Sequence) -> Iterator[tuple[str, object]]:
    """Yield (key, value) for every ``KEY VALUE`` or ``KEY=VALUE``."""
    words = list(opts)
    while words:
        key, equals_sign, value = str(words.pop(0)).partition("=")
        if not equals_sign:
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
                raise ConfigError(
                    f"{source}: {key}={show(value)} is not supported: only {_REFERENCE_ONLY[key]!r} is accepted; remove the key"
                )
            return
        raise ConfigError(f"{source}: unknown key {key}{_suggest_key(key, cfg)}")
    if isinstance(node[leaf], CfgNode):
        raise ConfigError(f"{source}: {key} is a section; set one of its keys: {', '.join(node[leaf])}")
    node[leaf] = _convert(value, node[leaf], key, source)


def _suggest_key(key: str, cfg: CfgNode) -> str:
    """End of the error message for an unknown key, which suggests the most similar key; "" if no key is similar."""
    known = {name.upper(): name for name in flatten(cfg)}
    normalised = key.upper().lstrip("-").replace("-", "_")
    leaf = normalised.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    if leaf in _ALIASES and not same_leaf:
        return f": did you mean {_ALIASES[leaf]}?"
    # A key of the same name in another section is a better match than a key of similar spelling.
    matches = get_close_matches(normalised, same_leaf or known, n=1, cutoff=0.0 if same_leaf else 0.4)
    return f": did you mean {known[matches[0]]}?" if matches else ""


def _literal(value: object) -> object:
    """Parse text as a Python literal: YAML reads 5e-4, None and (1, 2) as text, and all command-line values are text."""
    if not isinstance(value, str):
        return value
    if len(value) > MAX_TEXT:  # also avoids the deep recursion of the parser
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def _convert(value: object, example: object, key: str, source: str) -> object:
    """Convert a value to the type of ``example``.

    Args:
        example: the current value of the key, or, for an item of a list, an item of the current list.
        source: file name or flag, for messages.
    """
    literal = _literal(value)
    if isinstance(literal, int) and abs(literal) >= MAX_INT:
        raise ConfigError(f"{source}: {key} is {show(literal)}; give a smaller number")
    if isinstance(literal, (list, tuple)) and len(literal) > MAX_LIST:
        raise ConfigError(f"{source}: {key}={show(literal)} has {len(literal)} values; give at most {MAX_LIST}")
    if literal is None and key in _MAY_BE_NONE:
        return None
    if key in _MAY_BE_PAIR and isinstance(literal, (list, tuple)):
        return [_convert(item, 0, key, source) for item in literal]
    if isinstance(example, list) and key in _MAY_BE_PAIR:
        example = 0  # an earlier file set a pair; one number is legal too
    if isinstance(example, bool):
        if isinstance(literal, bool):
            return literal
    elif isinstance(example, str):
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return _check_text(str(value), key, source)
    elif isinstance(example, int):
        if isinstance(literal, int) and not isinstance(literal, bool):
            return literal
    elif isinstance(example, float) or key == "TRAIN.CLIP_GRAD":
        if isinstance(literal, (int, float)) and not isinstance(literal, bool):
            return _to_float(literal, key, source)
    elif isinstance(literal, (list, tuple)):  # the example is a list, or None for an optional list
        example_item = example[0] if example else 0.0
        return [_convert(item, example_item, key, source) for item in literal]
    expected = "list" if example is None else f"{type(example).__name__}, such as {example!r}"
    raise ConfigError(f"{source}: {key}={show(value)} is of type {type(literal).__name__}; expected {expected}")


def _to_float(number: float, key: str, source: str) -> float:
    """Convert to float. Infinity and NaN are illegal for every key: comparisons with them hide errors."""
    try:
        result = float(number)
    except OverflowError:
        result = INFINITY
    if not math.isfinite(result):
        raise ConfigError(f"{source}: {key}={show(number)} is not finite; give a finite number")
    return result


def _check_text(text: str, key: str, source: str) -> str:
    if len(text) > MAX_TEXT:
        raise ConfigError(f"{source}: {key}={show(text)} has {len(text)} characters; give at most {MAX_TEXT}")
    if not KEYS[key].is_path and not text.isprintable():
        raise ConfigError(f"{source}: {key}={text!r} contains a control character or a line break; remove it")
    if "\0" in text:
        raise ConfigError(f"{source}: {key}={text!r} contains a null character, which no path can have; remove it")
    return text


_MAY_BE_NONE = ("AUG.CUTMIX_MINMAX", "TRAIN.CLIP_GRAD")
_MAY_BE_PAIR = ("DATA.IMG_SIZE",)


def _validate(cfg: CfgNode) -> None:
    leaves = flatten(cfg)
    for name, key in KEYS.items():
        value = leaves[name]
        if key.choices and value not in key.choices:
            near = get_close_matches(value[:100], key.choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{name}={show(value)}: choose one of {', '.join(filter(None, key.choices))}{hint}")
        if key.minimum is None or value is None:
            continue
        if not all(key.minimum <= number <= key.maximum for number in (value if isinstance(value, list) else [value])):
            remedy = f"of at least {key.minimum}" if key.maximum == INFINITY else f"from {key.minimum} to {key.maximum}"
            numbers = "numbers, each" if isinstance(value, list) else "a number"
            raise ConfigError(f"{name}={show(value)}: give {numbers} {remedy}")
    for key in ("MODEL.NAME", "TAG"):
        if not leaves[key] or leaves[key] in (".", "..") or re.search(r"[/\\]", leaves[key]):
            raise ConfigError(
                f"{key}={show(leaves[key])} is used as a directory name; give a name other than . and .., without / and \\"
            )
        if len(os.fsencode(leaves[key])) > MAX_NAME_BYTES:
            raise ConfigError(f"{key}={show(leaves[key])} is used as a directory name; give it at most {MAX_NAME_BYTES} bytes")
    _validate_sizes(cfg)
    _validate_model(cfg)
    _validate_recipe(cfg)


def image_size(cfg: CfgNode) -> tuple[int, int]:
    """DATA.IMG_SIZE as (height, width)."""
    size = cfg.DATA.IMG_SIZE
    return (size, size) if isinstance(size, int) else tuple(size)


def _validate_sizes(cfg: CfgNode) -> None:
    size = cfg.DATA.IMG_SIZE
    if not isinstance(size, int) and len(size) != 2:
        raise ConfigError(f"DATA.IMG_SIZE={size}: give one number of pixels, or [height, width]")
    if not cfg.TEST.CROP and cfg.TEST.CROP_MODE == "short":
        raise ConfigError(
            "TEST.CROP=False: disables the crop, which conflicts with TEST.CROP_MODE=short; give only one of them"
        )


def _validate_model(cfg: CfgNode) -> None:
    la_keys, swin_keys, deit_keys = cfg.MODEL.LA, cfg.MODEL.SWIN, cfg.MODEL.DEIT
    defaults = flatten(_defaults())
    for key, value in flatten(cfg).items():
        types = next((types for prefix, types in _FAMILY_KEYS.items() if key.startswith(prefix)), MODEL_TYPES)
        if cfg.MODEL.TYPE not in types and value != defaults[key]:
            raise ConfigError(f"{key}={show(value)} has no effect with MODEL.TYPE={cfg.MODEL.TYPE}; remove it")
    if la_keys.KERNEL_SIZE % 2 == 0:
        raise ConfigError(
            f"MODEL.LA.KERNEL_SIZE={la_keys.KERNEL_SIZE}: an even kernel changes the size of the token map; use an odd number"
        )
    if not re.fullmatch(r"[LS]+|(?=[LS]*M)[LSM]+[0-9]{1,4}", la_keys.ATTN_TYPE):
        raise ConfigError(
            f"MODEL.LA.ATTN_TYPE={show(la_keys.ATTN_TYPE)}: give one letter per stage: L (linear), S (softmax) or M (mixed); "
            "with M, the number of linear blocks in that stage follows the last letter, as in LLMS3"
        )
    if not re.fullmatch(r"[1-9]{4}", la_keys.PVT_LA_SR_RATIOS):
        raise ConfigError(f"MODEL.LA.PVT_LA_SR_RATIOS={show(la_keys.PVT_LA_SR_RATIOS)}: give one digit per stage, as in 8421")
    if not re.fullmatch(r"[1-9][0-9]{0,3}(-[1-9][0-9]{0,3}){3}", la_keys.CSWIN_LA_SPLIT_SIZE):
        raise ConfigError(
            f"MODEL.LA.CSWIN_LA_SPLIT_SIZE={show(la_keys.CSWIN_LA_SPLIT_SIZE)}: give one number per stage, as in 56-28-14-7"
        )
    if not swin_keys.DEPTHS:
        raise ConfigError("MODEL.SWIN.DEPTHS=[]: give the number of blocks of each stage")
    if len(swin_keys.DEPTHS) != len(swin_keys.NUM_HEADS):
        raise ConfigError(
            f"MODEL.SWIN.DEPTHS={swin_keys.DEPTHS} and MODEL.SWIN.NUM_HEADS={swin_keys.NUM_HEADS}: "
            "both need one number per stage; give lists of the same length"
        )
    for stage, heads in enumerate(swin_keys.NUM_HEADS):
        if swin_keys.EMBED_DIM * 2**stage % heads:
            raise ConfigError(
                f"MODEL.SWIN.NUM_HEADS={swin_keys.NUM_HEADS}: {heads} heads do not divide the "
                f"{swin_keys.EMBED_DIM * 2**stage} channels of stage {stage + 1}; change the heads or MODEL.SWIN.EMBED_DIM"
            )
    if deit_keys.EMBED_DIM % deit_keys.NUM_HEADS:
        raise ConfigError(
            f"MODEL.DEIT.NUM_HEADS={deit_keys.NUM_HEADS} does not divide MODEL.DEIT.EMBED_DIM={deit_keys.EMBED_DIM}; "
            "change one of them"
        )


def _validate_recipe(cfg: CfgNode) -> None:
    if cfg.TRAIN.WARMUP_EPOCHS > cfg.TRAIN.EPOCHS:
        raise ConfigError(
            f"TRAIN.WARMUP_EPOCHS={cfg.TRAIN.WARMUP_EPOCHS}: longer than TRAIN.EPOCHS={cfg.TRAIN.EPOCHS}; shorten the warm-up"
        )
    if cfg.DATA.GLOBAL_BATCH_SIZE and cfg.TRAIN.ACCUMULATION_STEPS > 1:
        raise ConfigError(
            f"TRAIN.ACCUMULATION_STEPS={cfg.TRAIN.ACCUMULATION_STEPS}: conflicts with DATA.GLOBAL_BATCH_SIZE="
            f"{cfg.DATA.GLOBAL_BATCH_SIZE}, which determines the number of forward passes; give only one of them"
        )
    if cfg.TRAIN.FREEZE_BACKBONE and cfg.TRAIN.LAYER_DECAY < 1:
        raise ConfigError(
            f"TRAIN.LAYER_DECAY={cfg.TRAIN.LAYER_DECAY} has no effect with TRAIN.FREEZE_BACKBONE, which trains only "
            "the head; remove one of them"
        )
    for key in ("MEAN", "STD"):
        if len(cfg.DATA[key]) != 3 or (key == "STD" and min(cfg.DATA[key]) <= 0):
            raise ConfigError(f"DATA.{key}={cfg.DATA[key]}: give three numbers; STD must be above 0")
    for key in ("SCALE", "RATIO"):
        if len(cfg.AUG[key]) != 2 or not 0 < cfg.AUG[key][0] <= cfg.AUG[key][1]:
            raise ConfigError(f"AUG.{key}={cfg.AUG[key]}: give [minimum, maximum] with 0 < minimum <= maximum")
    minmax = cfg.AUG.CUTMIX_MINMAX
    if minmax is not None and not (len(minmax) == 2 and 0 < minmax[0] < minmax[1] <= 1):
        raise ConfigError(f"AUG.CUTMIX_MINMAX={minmax}: give [minimum, maximum] with 0 < minimum < maximum <= 1, or None")
    betas = cfg.TRAIN.OPTIMIZER.BETAS
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"TRAIN.OPTIMIZER.BETAS={betas}: give two numbers, each at least 0 and below 1")
    if cfg.MODEL.RESUME and cfg.MODEL.PRETRAINED:
        raise ConfigError(
            f"MODEL.RESUME={cfg.MODEL.RESUME} and MODEL.PRETRAINED={cfg.MODEL.PRETRAINED}: a resumed run already "
            "has weights; give only one of --resume and --pretrained"
        )
