"""Read weight files without running any code that they contain.

Formats: checkpoints of this project and of the reference, timm-style files, bare state dicts, safetensors.
"""

import argparse
import codecs
import collections
import hashlib
import io
import json
import mmap
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

WEIGHTS = ("raw", "ema", "auto")
METADATA_KEY = "flatten"  # key of the safetensors metadata that contains config, class names and other plain data, as JSON
# Modules that DDP, torch.compile, FSDP and activation checkpointing insert into names.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

MAX_DEPTH = 32  # maximum nesting of containers in a file
MAX_ITEMS = 5_000_000  # maximum number of values in a file; values that are referenced several times count each time
MAX_TEXT = 2**20  # maximum length of a text in a file
MAX_COUNT = 10**12  # maximum of counters such as the number of updates
MAX_CLASSES = 1_000_000
MAX_PATH = 200  # maximum length of the name of an entry in a message
_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8}
_DTYPES |= {torch.int8, torch.int16, torch.int32, torch.int64}
# Counters in checkpoints of this project.
_COUNTERS = ("num_updates", "num_skipped", "last_evaluation", "updates_per_epoch", "global_batch_size")


class CheckpointError(ValueError):
    """A weight file is missing, damaged, unsafe or does not match the model. The message includes the path and the reason."""


class _NumpyType:
    """Stands for numpy's dtype in pickles of numpy scalars. numpy itself does not validate the pickled state of a dtype."""

    def __init__(self, name: str, *_: object):
        self.name = name
        self.byte_order = "<"

    def __setstate__(self, state: tuple) -> None:
        self.byte_order = ">" if state[1] == ">" else "<"


def _read_numpy_scalar(kind: _NumpyType, data: bytes) -> bool | int | float:
    """The number in the pickle of a numpy scalar."""
    if kind.name not in ("b1", "i4", "i8", "f4", "f8"):
        raise pickle.UnpicklingError(f"a numpy scalar of type {kind.name}")
    return np.frombuffer(data, dtype=kind.byte_order + kind.name, count=1)[0].item()


# Types and functions, other than those of torch, that the pickles of released files refer to. They create only plain data: the
# config of the reference implementation (a yacs CfgNode, read as a dictionary), timm's arguments (a Namespace), and accuracies
# (numpy scalars, whose module differs between numpy 1 and 2, and whose bytes pickle stores with codecs.encode).
_PLAIN_GLOBALS = [
    (collections.OrderedDict, "yacs.config.CfgNode"),
    argparse.Namespace,
    (_NumpyType, "numpy.dtype"),
    (_read_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_read_numpy_scalar, "numpy._core.multiarray.scalar"),
]


def verify(path: Path, *, with_data: bool = True) -> None:
    """Read a zip-based checkpoint completely and verify its checksums.

    Args:
        with_data: if False, verify only that the entries of the archive fit into the file.

    Raises:
        CheckpointError: the file is damaged. ``torch.load`` alone does not detect flipped bits in tensor data.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size, entries = os.path.getsize(path), sum(entry.file_size for entry in archive.infolist())
            if entries > size:  # torch.save does not compress
                raise CheckpointError(f"{path}: its entries have {entries} bytes, but the file has {size}; not a checkpoint")
            damaged = archive.testzip() if with_data else None
    except CheckpointError:
        raise
    except Exception as error:  # zipfile and zlib raise many exception types on damaged files
        raise CheckpointError(f"{path}: damaged or not a checkpoint ({error})") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged (its entry {damaged} fails the checksum)")


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_checkpoint(path: str | Path, *, with_data: bool = True) -> dict:
    """Read a weight file as plain data on the CPU.

    Args:
        with_data: if False, neither read nor verify the values of the tensors of a zip-based file, which are mapped into
            memory. This takes milliseconds, whatever the size of the file.

    Returns:
        The dictionary of the file. For safetensors files: the tensors, or, if the file has this project's metadata,
        ``{"model": tensors, ...}`` with the metadata's entries. Tensors are dense and no larger than their data in the file.

    Raises:
        CheckpointError: the file is missing or damaged, contains code, which is never run, or has an entry with an illegal
            type, structure or value, which the message names.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file")
    if os.path.getsize(path) == 0:
        raise CheckpointError(f"{path}: damaged or not a checkpoint (the file is empty)")
    state = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path, with_data=with_data)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} contains {type(state).__name__}, not a dictionary of weights")
    try:
        _measure(state, "", 0, {})
        _check_entries(state)
    except _IllegalEntryError as error:
        raise CheckpointError(f"{path} is not a valid checkpoint: {error}; download it again, or use another file") from None
    return state


def _read_pickle(path: Path, *, with_data: bool) -> object:
    is_archive = _is_archive(path)
    if is_archive:
        verify(path, with_data=with_data)
    try:
        _check_encodings(path, is_archive=is_archive)
        with torch.serialization.safe_globals(_PLAIN_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive and not with_data)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0] if "GLOBAL" not in str(error) else _describe_global(str(error))
        raise CheckpointError(f"{path}: not loaded, since it is damaged or contains code: {reason}") from None
    except Exception as error:  # a damaged pickle raises many exception types
        raise CheckpointError(f"{path}: damaged or not a checkpoint ({type(error).__name__}: {error})") from None


def _check_encodings(path: Path, *, is_archive: bool) -> None:
    """Reject pickles that could encode bytes again and again. torch allows ``codecs.encode``, as numpy scalars use it.

    Some codecs, such as hex, multiply the length of bytes, so that a few nested calls exhaust the memory.

    Raises:
        pickle.UnpicklingError: the file calls ``codecs.encode`` and contains the name of such a codec.
    """
    with open(path, "rb") as file:
        if is_archive:
            with zipfile.ZipFile(file) as archive:
                contents = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
        else:  # before version 1.6, torch saved several pickles in a row, of which the first four contain no tensor data
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                contents = [content[:]] if content.find(b"_codecs\nencode\n") >= 0 else []
    for content in contents:
        if b"_codecs\nencode\n" not in content:
            continue
        stream = io.BytesIO(content)
        for _ in range(1 if is_archive else 4):
            for _, text, _ in pickletools.genops(stream):
                if isinstance(text, str) and len(text) < 32 and _is_binary_codec(text):
                    raise pickle.UnpicklingError(f"it may call codecs.encode with the codec {text}")


def _is_binary_codec(name: str) -> bool:
    try:
        return not codecs.lookup(name)._is_text_encoding
    except (LookupError, ValueError):
        return False


class _IllegalEntryError(Exception):
    """A value in a file is not plain data, exceeds a limit or has an illegal value. The message starts with its name."""


def _measure(value: object, path: str, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Number of values in nested containers, and their number of levels.

    Args:
        path: name of the container in the file, for messages.
        depth: number of containers around this one.
        known: the results so far by id of the container: a small file may contain 2^60 references to one value.

    Raises:
        _IllegalEntryError: a value is nested too deeply or not plain data, or there are too many values.
    """
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if not isinstance(value, (dict, list, tuple, set, frozenset)):
        if problem := _describe_illegal_value(value):
            raise _IllegalEntryError(f"{path} {problem}")
        return 1, 0
    num_values, num_levels = known.get(id(value), (len(value), 1))
    if depth + num_levels > MAX_DEPTH:
        raise _IllegalEntryError(f"{path} is nested more than {MAX_DEPTH} levels deep")
    if id(value) not in known:
        if problem := _describe_illegal_attributes(value):
            raise _IllegalEntryError(f"{path or 'its top level'} {problem}")
        if hasattr(value, "_metadata"):
            _measure(value._metadata, f"{path} (metadata)", depth + 1, known)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if type(key) not in (str, int):
                raise _IllegalEntryError(f"{path or 'its top level'} has a key of type {type(key).__name__}")
            size, levels = _measure(item, f"{path}.{key}"[-MAX_PATH:].lstrip("."), depth + 1, known)
            num_values, num_levels = num_values + size, max(num_levels, levels + 1)
        known[id(value)] = num_values, num_levels
    if num_values > MAX_ITEMS:
        raise _IllegalEntryError(f"{path or 'it'} has more than {MAX_ITEMS} values")
    return num_values, num_levels


def _describe_illegal_attributes(container: object) -> str:
    """Why the attributes of a container, which a pickle may set, are not those of a state dict or config; "" if they are."""
    attributes = getattr(container, "__dict__", {})
    if hidden := sorted(attributes.keys() & set(dir(collections.OrderedDict))):
        return f"has an attribute {hidden[0]}, which hides a method"
    metadata = attributes.get("_metadata", {})
    if not isinstance(metadata, dict) or not all(isinstance(entry, dict) for entry in metadata.values()):
        return "has metadata that are not those of a state dict"
    return ""


def _describe_illegal_value(value: object) -> str:
    """Why a value other than a container is not plain data; "" if it is."""
    if isinstance(value, Tensor):
        return _describe_illegal_tensor(value)
    if isinstance(value, (str, bytes, bytearray)):
        return f"has {len(value)} characters; at most {MAX_TEXT} are allowed" if len(value) > MAX_TEXT else ""
    if isinstance(value, int):
        return "is an integer of more than 64 bits" if abs(value) >= 2**63 else ""
    if value is None or isinstance(value, (float, torch.dtype, torch.device)):
        return ""
    return f"is of type {type(value).__name__}, which is not plain data"


def _describe_illegal_tensor(value: Tensor) -> str:
    """Why a tensor cannot be weights; "" if it can. A view with stride 0 can have 10^12 elements in a file of 4 bytes."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"is a {type(value).__name__}, not a plain tensor"
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        return "is a sparse, quantized or nested tensor; only dense tensors are allowed"
    if value.device.type != "cpu":
        return f"is a tensor without data, on the device {value.device}"
    if value.dtype not in _DTYPES:
        return f"is a tensor of type {str(value.dtype).removeprefix('torch.')}, which is not supported"
    size, stored = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    if size > stored:
        return f"is a tensor of {size} bytes (shape {tuple(value.shape)}), of which the file has only {stored}"
    return ""


def _check_entries(state: dict) -> None:
    """Check the values of the entries of a checkpoint of this project; entries may be missing.

    Raises:
        _IllegalEntryError: an entry has an illegal value.
    """

    def require(is_legal: bool, problem: str) -> None:
        if not is_legal:
            raise _IllegalEntryError(problem)

    names = state.get("class_names")
    if isinstance(names, (list, tuple)):
        require(len(names) <= MAX_CLASSES, f"class_names has {len(names)} names; at most {MAX_CLASSES} are allowed")
        odd = sorted({type(name).__name__ for name in names} - {"str", "int"})
        require(not odd, f"class_names has an entry of type {', '.join(odd)}, which is not a name")
    if "num_updates" not in state:  # a file of another project, whose entries may have other meanings
        return
    tensor = _find_tensor(state.get("config"))
    require(not tensor, f"config.{tensor} is a tensor, not a setting")
    best = state["best"] if isinstance(state.get("best"), dict) else {}
    counts = [(name, state.get(name, 0), 0) for name in _COUNTERS]
    counts += [(f"best.{name}", best.get(name, 0), -1) for name in ("epoch", "num_updates")]
    for name, value, smallest in counts:
        is_legal = type(value) is int and smallest <= value <= MAX_COUNT
        require(is_legal, f"{name} is {_show(value)}, not a number from {smallest} to {MAX_COUNT}")
    accuracy, weights = best.get("acc1", 0.0), best.get("weights", "")
    is_percent = type(accuracy) in (int, float) and -1 <= accuracy <= 100  # NaN is not
    require(is_percent, f"best.acc1 is {_show(accuracy)}, not an accuracy in percent")
    require(weights in ("", "raw", "ema"), f"best.weights is {_show(weights)}, not raw or ema")


def _find_tensor(tree: object) -> str:
    """Name of the first tensor in nested dictionaries and lists; "" if there is none."""
    if not isinstance(tree, (dict, list, tuple)):
        return ""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, Tensor):
            return str(key)
        if name := _find_tensor(value):
            return f"{key}.{name}"
    return ""


def _show(value: object) -> str:
    """A value in an error message; only the type of a value that could be large."""
    return repr(value) if isinstance(value, (bool, int, float)) else f"of type {type(value).__name__}"


def _is_archive(path: Path) -> bool:
    """Whether a file is a zip archive, intact or damaged."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # the central directory of the archive is damaged
        return True


def _is_safetensors(path: Path) -> bool:
    """Whether a file has the suffix or the first bytes of safetensors: a length of 8 bytes and a header in JSON."""
    if path.suffix == ".safetensors":
        return True
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < os.path.getsize(path)


def _read_safetensors(path: Path) -> dict:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
        content = json.loads(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None
    except (SafetensorError, ValueError, OSError, RuntimeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from None
    return {**content, "model": tensors} if isinstance(content, dict) else tensors


def _describe_global(message: str) -> str:
    """Shorten torch's message about a forbidden global to the name of the global."""
    match = re.search(r"GLOBAL ([\w.]+)", message)
    return f"it requires {match.group(1)}, which is not allowed" if match else message


def stored_weights(state: Mapping) -> dict[str, dict[str, Tensor]]:
    """State dicts of a weight file by label (``raw``, ``ema``), without the parts of names that wrappers such as DDP insert."""
    state_dicts = {
        "raw": next((state[key] for key in ("model", "state_dict") if isinstance(state.get(key), dict)), None),
        "ema": next((state[key] for key in ("state_dict_ema", "model_ema") if isinstance(state.get(key), dict)), None),
    }
    if not any(state_dicts.values()) and state and all(isinstance(value, Tensor) for value in state.values()):
        state_dicts["raw"] = state  # a bare state dict
    return {
        label: with_metadata(
            {
                _WRAPPERS.sub("", name): value
                for name, value in weights.items()
                if isinstance(name, str) and isinstance(value, Tensor)
            },
            weights,
        )
        for label, weights in state_dicts.items()
        if weights
    }


def with_metadata(state_dict: dict[str, Tensor], source: Mapping) -> dict[str, Tensor]:
    """A state dict with the metadata that ``Module.state_dict`` attached to ``source``, if any; see ``torch.save``."""
    copied = collections.OrderedDict(state_dict)
    copied._metadata = getattr(source, "_metadata", {})  # type: ignore[attr-defined]
    return copied


def preferred_weights(state: Mapping) -> str:
    """Label that ``auto`` selects: the more accurate weights in this checkpoint's own evaluation, else ``ema``, else ``raw``.

    ``best`` describes the best evaluation of the run so far, which may be that of another checkpoint.
    """
    stored = stored_weights(state)
    best = state.get("best")
    if isinstance(best, dict) and best.get("num_updates") == state.get("num_updates"):
        recorded = best.get("weights")
        if isinstance(recorded, str) and recorded in stored:
            return recorded
    return "ema" if "ema" in stored else "raw"


def choose_weights(state: Mapping, weights: str, path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """Label and state dict of the requested weights: ``raw``, ``ema`` or ``auto`` (see ``preferred_weights``).

    Raises:
        CheckpointError: the checkpoint does not have these weights.
    """
    stored = stored_weights(state)
    label = preferred_weights(state) if weights == "auto" else weights
    if label not in stored:
        raise CheckpointError(f"{path} contains no {label} weights; its keys are {', '.join(map(str, state))}")
    return label, stored[label]
