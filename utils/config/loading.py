"""Load the configuration of a run.

Defaults, BASE files, config files and command line are merged in this order, so that later ones override earlier ones. The
result is checked and frozen. ``utils.config.keys`` defines the keys, and ``utils.config.rules`` the legal values.
"""

import ast
import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from yacs.config import CfgNode

from utils.config.key import INFINITY
from utils.config.keys import KEYS
from utils.config.optimizers import OPTIONS, default_option
from utils.config.reading import MAX_INT, read_yaml, show, suggest_file
from utils.config.rules import check_rules
from utils.errors import ConfigError
from utils.urls import conceal

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
# Name of a key or flag in other projects -> key of this project.
_ALIASES = {
    "LR": "TRAIN.BASE_LR",
    "LEARNING_RATE": "TRAIN.BASE_LR",
    "WD": "TRAIN.WEIGHT_DECAY",
    "J": "DATA.NUM_WORKERS",
    "WORKERS": "DATA.NUM_WORKERS",
    "CLASSES": "MODEL.NUM_CLASSES",
    "INPUT_SIZE": "DATA.IMG_SIZE",
    "RESOLUTION": "DATA.IMG_SIZE",
    "MODEL": "MODEL.TYPE",
    "DROP_PATH": "MODEL.DROP_PATH_RATE",
    "SMOOTHING": "MODEL.LABEL_SMOOTHING",
    "CLIP": "TRAIN.CLIP_GRAD",
}
MAY_BE_NONE = ("AUG.CUTMIX_MINMAX", "TRAIN.CLIP_GRAD")
_MAY_BE_LIST = {
    "AUG.CUTMIX_MINMAX": [0.2, 0.8],
    "DATA.IMG_SIZE": [224, 224],
    "TRAIN.CLASS_WEIGHTS": [0.5, 2.0],
    "TRAIN.SIZE_SCHEDULE": [[0, 224]],
}  # key whose default is no list, or an empty one -> example of a list

CONFIGS = Path(__file__).parents[2] / "configs"  # the shipped configs; their file names are the model names
MAX_TEXT = 4096  # maximum length of a value
MAX_LIST = 16  # maximum length of a list, except for a list with a value per class
REFERENCE_PROCESSES = 8  # number of GPUs in the recipes of the reference implementation


def load_config(path: str | Path | Sequence[str | Path], opts: Sequence = ()) -> CfgNode:
    """Load the configuration of a run, completed with defaults, checked and frozen.

    Args:
        path: one or more YAML files, such as a model's and a recipe's, see ``find_config``; later files override earlier ones.
            Missing keys come from the BASE files, then from the defaults.
        opts: KEY, VALUE, ... or KEY=VALUE, ...; they override the files.

    Raises:
        ConfigError: unknown key, wrong type, illegal value, missing file or cyclic BASE files.
    """
    cfg = _defaults()
    for file in [path] if isinstance(path, (str, Path)) else path:
        _merge_file(cfg, find_config(file), chain=())
    return _complete(cfg, opts)


def find_config(name: str | Path) -> Path:
    """Find a config file: an existing path, with or without extension, or the name of a shipped config.

    Args:
        name: such as ``configs/flatten_swin_t.yaml``, ``flatten_swin_t`` or ``recipes/finetune``.

    Raises:
        ConfigError: there is no config of this name, or there are several.
    """
    path = Path(name)
    if os.path.exists(path) or path.suffix == ".yml" or path.is_absolute():
        return path
    file = path if path.suffix == ".yaml" else path.with_name(f"{path.name}.yaml")
    if os.path.exists(file):
        return file
    shipped = {config: config.relative_to(CONFIGS) for config in sorted(CONFIGS.rglob("[!.]*.yaml"))}
    found = [config for config, relative in shipped.items() if relative.parts[-len(file.parts) :] == file.parts]
    if len(found) == 1:
        return found[0]
    if file == path and file.parent != Path():
        return path  # the error of reading it suggests a file in the same directory
    near = get_close_matches(file.name, {relative.name for relative in shipped.values()}, n=3)
    names = [_shortest(config) for config in found or shipped if found or config.name in near]
    hint = f"; there are {', '.join(names)}" if len(names) > 1 else f"; did you mean {names[0]}?" if names else ""
    raise ConfigError(f"{name}: {'several configs have' if found else 'no config has'} this name{hint}")


def _shortest(path: Path) -> str:
    """The path, relative to the current directory if that is shorter."""
    try:
        return min(str(path), os.path.relpath(path), key=len)
    except (OSError, ValueError):  # the current directory was removed, or is on another drive
        return str(path)


def load_stored_config(tree: Mapping, opts: Sequence = (), *, source: str, sections: Sequence[str] = ()) -> CfgNode:
    """Load the configuration stored in a checkpoint, completed with defaults, checked and frozen.

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
    known = KEYS.keys() - {"BASE", "MODEL.RESUME", "MODEL.PRETRAINED"}
    for key, value in flatten(tree).items():
        if key in known and key.startswith(tuple(sections) or ""):
            _set(cfg, key, value, source)
    return _complete(cfg, opts)


def _defaults() -> CfgNode:
    cfg = CfgNode()
    for name, key in KEYS.items():
        *sections, leaf = name.split(".")
        node = cfg
        for section in sections:
            node = node.setdefault(section, CfgNode())
        node[leaf] = os.path.expanduser(str(key.default)) if key.is_path else copy.copy(key.default)
    cfg.TRAIN.OPTIMIZER.update(dict.fromkeys(OPTIONS))  # their defaults depend on the optimizer, see ``_complete``
    return cfg


def _complete(cfg: CfgNode, opts: Sequence) -> CfgNode:
    if cfg.TRAIN.RECIPE_BATCH_SIZE == 0:  # computed before --opts is applied, which may change DATA.BATCH_SIZE
        cfg.TRAIN.RECIPE_BATCH_SIZE = REFERENCE_PROCESSES * cfg.DATA.BATCH_SIZE
    for key, value in _pairs(opts):
        if isinstance(value, str) and value in KEYS:
            raise ConfigError(f"--opts: {key!r} has no value: the next word is the key {value}; give KEY VALUE pairs")
        _set(cfg, key, value, "--opts")
    options = cfg.TRAIN.OPTIMIZER
    for option in OPTIONS:
        if options[option] is None:
            default = default_option(options.NAME, option)
            options[option] = copy.copy(KEYS[f"TRAIN.OPTIMIZER.{option}"].default) if default is None else default
    cfg.BASE = [""]  # BASE files are merged; loading a dump of this config must not merge them again
    check_rules(cfg, flatten(cfg))
    cfg.freeze()
    return cfg


def flatten(cfg: Mapping, prefix: str = "") -> dict[str, object]:
    """Flatten nested sections into one dictionary with dotted keys."""
    leaves: dict[str, object] = {}
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def to_dict(cfg: Mapping) -> dict:
    """Convert to plain nested dictionaries, as stored in checkpoints."""
    return {key: to_dict(value) if isinstance(value, Mapping) else value for key, value in cfg.items()}


def image_size(cfg: CfgNode) -> tuple[int, int]:
    """DATA.IMG_SIZE as (height, width)."""
    size = cfg.DATA.IMG_SIZE
    return (size, size) if isinstance(size, int) else tuple(size)


def train_sizes(cfg: CfgNode) -> list[tuple[int, tuple[int, int]]]:
    """Input sizes of training: (first epoch, (height, width)), in the order of the epochs, see TRAIN.SIZE_SCHEDULE."""
    sizes = [(epoch, (sides[0], sides[-1])) for epoch, *sides in cfg.TRAIN.SIZE_SCHEDULE]
    return sizes or [(0, image_size(cfg))]


def _merge_file(cfg: CfgNode, path: Path, chain: tuple[Path, ...]) -> None:
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path} is not a YAML file; give a config whose name ends in .yaml or .yml{suggest_file(path)}")
    try:
        path = Path(os.path.realpath(path))
    except ValueError as error:  # a null character
        raise ConfigError(f"{str(path)!r} is not a path ({error}); correct BASE in {chain[-1]}") from None
    if path in chain:
        raise ConfigError(f"{path}: BASE files form a cycle: {' -> '.join(str(p) for p in (*chain, path))}")
    tree = read_yaml(path, f" (BASE of {chain[-1]})" if chain else "")
    bases = tree.pop("BASE", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) and len(base) <= MAX_TEXT for base in bases):
        raise ConfigError(f"{path}: BASE={show(bases)}: give a file, or a list of files")
    for base in filter(None, bases):
        _merge_file(cfg, path.parent / os.path.expanduser(base), (*chain, path))
    _merge_section(cfg, tree, cfg, str(path))


def _merge_section(cfg: CfgNode, tree: Mapping, section: CfgNode, source: str, prefix: str = "") -> None:
    """Set the keys of a section of a config file.

    Args:
        tree: the section in the file.
        section: the same section of ``cfg``.
        source: file name, for messages.
        prefix: name of the section, with a final dot.
    """
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if "." in key:
            *sections, leaf = key.split(".")
            nested = "".join(f"{part}: {{" for part in sections) + f"{leaf}: ..." + "}" * len(sections)
            raise ConfigError(f"{source}: the key {name} contains a dot; write {nested} instead")
        child = section.get(key)
        if not isinstance(child, CfgNode):
            _set(cfg, name, value, source)
        elif isinstance(value, Mapping):
            _merge_section(cfg, value, child, source, f"{name}.")
        else:
            raise ConfigError(f"{source}: {name}={show(value)} assigns a value to a section; set its keys: {', '.join(child)}")


def option_keys(opts: Sequence) -> set[str]:
    """Keys of ``KEY VALUE`` or ``KEY=VALUE`` pairs."""
    return {key for key, _ in _pairs(opts)}


def _pairs(opts: Sequence) -> Iterator[tuple[str, object]]:
    """Yield (key, value) for every ``KEY VALUE`` or ``KEY=VALUE``."""
    words = iter(opts)
    for word in words:
        key, equals_sign, value = str(word).partition("=")
        if not equals_sign:
            try:
                value = next(words)
            except StopIteration:
                raise ConfigError(f"--opts: {key!r} has no value; give KEY VALUE or KEY=VALUE pairs") from None
        yield key, value


def _set(cfg: CfgNode, name: str, value: object, source: str) -> None:
    """Set a key to a value, converted to the type of the key's default.

    Args:
        source: file name or flag, for messages.
    """
    if name not in KEYS:
        if name in _REFERENCE_ONLY:
            if _literal(value) == _REFERENCE_ONLY[name]:
                return
            raise ConfigError(
                f"{source}: {name}={show(value)} is not supported: only {_REFERENCE_ONLY[name]!r} is accepted; remove the key"
            )
        if keys := [key for key in KEYS if key.startswith(f"{name}.")]:
            raise ConfigError(f"{source}: {name} is a section; set one of its keys: {', '.join(keys)}")
        raise ConfigError(f"{source}: unknown key {name}{_suggest_key(name)}")
    *sections, leaf = name.split(".")
    for section in sections:
        cfg = cfg[section]
    literal = _literal(value)
    if literal is None and name in MAY_BE_NONE:
        cfg[leaf] = None
    elif name in _MAY_BE_LIST and (isinstance(literal, (list, tuple)) or KEYS[name].default == []):
        cfg[leaf] = _convert(literal, _MAY_BE_LIST[name], name, source)
    else:
        cfg[leaf] = _convert(value, KEYS[name].default, name, source)


def similar_name(name: str) -> str | None:
    """The key that a name of another project, such as ``lr``, means, or else the key with this name in any section."""
    leaf = name.upper().rsplit(".", 1)[-1]
    same_leaf = [key for key in KEYS if key.rsplit(".", 1)[-1] == leaf]
    if not same_leaf:
        return _ALIASES.get(leaf)
    return get_close_matches(name.upper(), same_leaf, n=1, cutoff=0.0)[0]


def _suggest_key(name: str) -> str:
    """End of the error message for an unknown key, which suggests the most similar key; "" if no key is similar."""
    normalised = name.upper().lstrip("-").replace("-", "_")
    # A key of the same name in another section is a better match than a key of similar spelling.
    key = similar_name(normalised) or next(iter(get_close_matches(normalised, KEYS, n=1, cutoff=0.4)), None)
    return f": did you mean {key}?" if key else ""


def _literal(value: object) -> object:
    """Parse text as a Python literal: YAML reads 5e-4, None and (1, 2) as text, and all command-line values are text."""
    if not isinstance(value, str) or len(value) > MAX_TEXT:  # long text could exceed the parser's recursion limit
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def _convert(value: object, example: object, name: str, source: str, whole: Sequence | None = None) -> object:
    """Convert a value to the type of ``example``: the default of the key, or an item of it.

    Args:
        whole: the value of the key, if ``value`` is an item of it.
    """
    literal = _literal(value)
    if isinstance(literal, int) and abs(literal) >= MAX_INT:
        raise ConfigError(f"{source}: {name} is {show(literal)}; give a smaller number")
    if isinstance(literal, (list, tuple)) and len(literal) > MAX_LIST and name != "TRAIN.CLASS_WEIGHTS":
        raise ConfigError(f"{source}: {name}={show(literal)} has {len(literal)} values; give at most {MAX_LIST}")
    if isinstance(example, str) and isinstance(value, (str, int)) and not isinstance(value, bool):
        return _check_text(str(value), name, source)
    if isinstance(example, float) and isinstance(literal, (int, float)) and not isinstance(literal, bool):
        return _to_float(literal, name, source)
    if isinstance(example, list) and isinstance(literal, (list, tuple)):
        return [_convert(item, example[0], name, source, literal if whole is None else whole) for item in literal]
    if type(literal) is type(example):  # bool or int
        return literal
    kind = f"is of type {type(literal).__name__}"
    if whole is not None:
        remedy = f"give a value such as {_MAY_BE_LIST.get(name, KEYS[name].default)}"
        raise ConfigError(f"{source}: {name}={show(whole)}: {show(value)} {kind}; {remedy}")
    expected = "list" if example is None else f"{type(example).__name__}, such as {example!r}"
    raise ConfigError(f"{source}: {name}={show(value)} {kind}; expected {expected}")


def _to_float(number: float, name: str, source: str) -> float:
    """Convert to float. Infinity and NaN are illegal for every key: comparisons with them hide errors."""
    try:
        result = float(number)
    except OverflowError:
        result = INFINITY
    if not math.isfinite(result):
        raise ConfigError(f"{source}: {name}={show(number)} is not finite; give a finite number")
    return result


def _check_text(text: str, name: str, source: str) -> str:
    if len(text) > MAX_TEXT:
        remedy = ", or write the list in a YAML file, and add this file to --cfg" if name in _MAY_BE_LIST else ""
        raise ConfigError(f"{source}: {name}={show(text)} has {len(text)} characters; give at most {MAX_TEXT}{remedy}")
    if not KEYS[name].is_path and not text.isprintable():
        raise ConfigError(f"{source}: {name}={text!r} contains a control character or a line break; remove it")
    if "\0" in text:
        raise ConfigError(f"{source}: {name}={text!r} contains a null character, which no path can have; remove it")
    # Only the request for a download uses the secrets of a URL, so that no copy of the config contains them.
    return conceal(os.path.expanduser(text)) if KEYS[name].is_path else text
