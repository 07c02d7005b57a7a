"""Read weight files without running any code that they contain.

Formats: checkpoints of this project and of the reference, timm-style files, bare state dicts, safetensors.
"""

import argparse
import codecs
import collections
import hashlib
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

WEIGHTS = ("raw", "ema", "auto")
METADATA_KEY = "flatten"  # key of the safetensors metadata that contains config, class names and other plain data, as JSON
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")

# Types and functions, other than those of torch, that the pickles of released files refer to. They create only plain data: the
# config of the reference implementation (a yacs CfgNode, read as a dictionary), timm's arguments (a Namespace), and accuracies
# (numpy scalars, whose module differs between numpy 1 and 2, and whose bytes pickle stores with codecs.encode).
_PLAIN_GLOBALS = [
    (collections.OrderedDict, "yacs.config.CfgNode"),
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    codecs.encode,
]


class CheckpointError(ValueError):
    """A weight file is missing, damaged, unsafe or does not match the model. The message includes the path and the reason."""


def verify(path: Path) -> None:
    """Read a zip-based checkpoint completely and verify its checksums.

    Raises:
        CheckpointError: the file is damaged. ``torch.load`` alone does not detect flipped bits in tensor data.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile and zlib raise many exception types on damaged files
        raise CheckpointError(f"{path}: damaged or not a checkpoint ({error})") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged (its entry {damaged} fails the checksum)")


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: io.BufferedReader) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def read_checkpoint(path: str | Path) -> dict:
    """Read a weight file as plain data on the CPU.

    Returns:
        The dictionary of the file. For safetensors files: the tensors, or, if the file has this project's metadata,
        ``{"model": tensors, ...}`` with the metadata's entries.

    Raises:
        CheckpointError: the file is missing or damaged, or contains code, which is never run.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if _is_archive(path):
        verify(path)
    try:
        with torch.serialization.safe_globals(_PLAIN_GLOBALS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0] if "GLOBAL" not in str(error) else _describe_global(str(error))
        raise CheckpointError(f"{path}: not loaded, since it is damaged or contains code: {reason}") from None
    except Exception as error:  # a damaged pickle raises many exception types
        raise CheckpointError(f"{path}: damaged or not a checkpoint ({type(error).__name__}: {error})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} contains {type(state).__name__}, not a dictionary of weights")
    return state


def _is_archive(path: Path) -> bool:
    """Whether a file is a zip archive, intact or damaged."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # the central directory of the archive is damaged
        return True


def _read_safetensors(path: Path) -> dict:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
        content = json.loads(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from None
    return {"model": tensors, **content} if isinstance(content, dict) else tensors


def _describe_global(message: str) -> str:
    """Shorten torch's message about a forbidden global to the name of the global."""
    match = re.search(r"GLOBAL ([\w.]+)", message)
    return f"it requires {match.group(1)}, which is not allowed" if match else message


def stored_weights(state: Mapping) -> dict[str, dict[str, Tensor]]:
    """State dicts of a weight file by label (``raw``, ``ema``), without the name prefixes of DDP and torch.compile."""
    state_dicts = {
        "raw": next((state[key] for key in ("model", "state_dict") if isinstance(state.get(key), dict)), None),
        "ema": next((state[key] for key in ("state_dict_ema", "model_ema") if isinstance(state.get(key), dict)), None),
    }
    if not any(state_dicts.values()) and state and all(isinstance(value, Tensor) for value in state.values()):
        state_dicts["raw"] = state  # a bare state dict
    return {
        label: {
            _WRAPPERS.sub("", name): value
            for name, value in weights.items()
            if isinstance(name, str) and isinstance(value, Tensor)
        }
        for label, weights in state_dicts.items()
        if weights
    }


def preferred_weights(state: Mapping) -> str:
    """Label that ``auto`` selects: the weights with the best accuracy in training, else ``ema`` if stored, else ``raw``."""
    stored = stored_weights(state)
    best = state.get("best")
    recorded = best.get("weights") if isinstance(best, dict) else None
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
