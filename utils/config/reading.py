"""Read YAML files that may come from anyone: no code, no duplicate keys, no aliases that grow without limit."""

import os
import reprlib
from collections import Counter
from difflib import get_close_matches
from pathlib import Path

import yaml

from utils.errors import ConfigError

MAX_FILE_BYTES = 2**20  # maximum size of a file
MAX_DEPTH = 16  # maximum nesting of lists and sections
MAX_ITEMS = 10_000  # maximum number of values; aliases count each time
MAX_INT = 2**63  # exclusive maximum of an integer


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


def read_yaml(path: Path, origin: str = "") -> dict:
    """Read a YAML file as nested dictionaries with text as keys.

    Args:
        origin: the file that refers to this one, for messages; "" if there is none.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is not a small tree of sections, lists and values.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}{origin} cannot be read: {error.strerror}{suggest_file(path)}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has more than {MAX_FILE_BYTES} bytes, which is too large for a config; give a config file")
    try:
        tree = yaml.load(content.decode("utf-8-sig"), _UniqueKeyLoader)
    except RecursionError:
        raise ConfigError(f"{path} is not YAML: it is nested too deeply; write at most {MAX_DEPTH} levels") from None
    except Exception as error:  # PyYAML raises many exception types, such as ValueError for an impossible date
        raise ConfigError(f"{path} cannot be parsed as YAML: {' '.join(str(error).split())}; correct the file") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} is of type {type(tree).__name__}, not a mapping; give keys and values")
    _check_tree(tree, path)
    return tree


def _check_tree(tree: dict, path: Path) -> None:
    """Check the structure of a file. Aliases can make a small file infinitely deep, or exponentially large.

    Raises:
        ConfigError: too many levels or values, or a key that is not text.
    """
    pending: list[tuple[object, str, int]] = [(tree, "", 0)]
    num_items = 0
    while pending:
        node, name, depth = pending.pop()
        if isinstance(node, dict):
            children = list(node.items())
            if invalid := [key for key in node if not isinstance(key, str)]:
                raise ConfigError(f"{path}: the key {show(invalid[0])} is not text; correct it, or quote it")
        elif isinstance(node, (list, tuple, set)):
            children = list(enumerate(node))
        else:
            continue
        num_items += len(children)
        if depth > MAX_DEPTH or num_items > MAX_ITEMS:
            raise ConfigError(
                f"{path}: {name[:200]} has more than {MAX_DEPTH} levels or makes the config larger than {MAX_ITEMS} values; "
                "write the values without aliases"
            )
        pending += [(value, f"{name}.{key}".lstrip("."), depth + 1) for key, value in children]


def suggest_file(path: Path) -> str:
    """Suggest the config of the most similar name at the end of an error; "" if ``path`` exists, or if no name is similar."""
    if os.path.exists(path):
        return ""
    try:
        names = sorted(file.name for file in path.parent.glob("[!.]*.yaml"))
    except OSError:  # the path is too long
        return ""
    near = get_close_matches(f"{path.stem}.yaml", names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
