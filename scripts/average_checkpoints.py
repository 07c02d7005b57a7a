"""Average the weights of several checkpoints into one file, as in model soups (https://arxiv.org/abs/2203.05482).

The file contains the averaged weights, and the config and class names of the first checkpoint. Evaluate it with
main.py --eval --resume, or fine-tune from it with main.py --pretrained.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.classes import ClassMatch, compare_classes
from engine.checkpoint_writer import save_checkpoint
from jobs.locate_checkpoint import Location, locate, stored_class_names
from models.checkpoints.reader import WEIGHTS, CheckpointError, choose_weights, read_checkpoint, sha256
from utils.config.loading import flatten, show
from utils.text import printable

# Prefixes of the keys that must be equal. Equal shapes do not imply this: the focusing factor, for example, is not a weight.
COMPARED_KEY_PREFIXES = (
    *("MODEL.TYPE", "MODEL.SWIN.", "MODEL.DEIT.", "MODEL.LA."),
    *("DATA.IMG_SIZE", "DATA.MEAN", "DATA.STD"),
)


def average(locations: list[Location], weights: str) -> dict:
    """Average the weights of checkpoints in float64. State-dict entries that are not floating-point must be equal in all files.

    Args:
        weights: raw, ema or auto, see ``choose_weights``.

    Returns:
        A checkpoint: the averages as ``model``, the config of the first file, and the class names.

    Raises:
        CheckpointError: a file cannot be read, does not contain the requested weights, or differs from the first file in model,
            normalisation, classes or an entry that is not floating-point; weights or their averages are not finite.
    """
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    metadata: dict = {}
    names: tuple[str, ...] = ()
    unnamed = []
    paths = [location.path for location in locations]
    for path, location in zip(paths, locations, strict=True):
        state = read_checkpoint(path)
        if path == paths[0] and "config" in state:
            metadata["config"] = state["config"]
        check_same_config(metadata.get("config"), state.get("config"), paths[0], path)
        own_names = stored_class_names(state, location)
        if own_names and names and (difference := compare_classes(own_names, names))[0] is not ClassMatch.EQUAL:
            raise CheckpointError(
                f"{path} has different classes than {paths[0]}, or another order: {difference[1]}; all checkpoints must have "
                "the same classes in the same order"
            )
        names = names or own_names
        if not own_names:
            unnamed.append(path)
        _, state_dict = choose_weights(state, weights, path)
        if total and {name: value.shape for name, value in state_dict.items()} != {name: v.shape for name, v in total.items()}:
            raise CheckpointError(
                f"{path} contains a different model than {paths[0]}; all checkpoints must be of the same model"
            )
        for name, value in state_dict.items():
            if not value.is_floating_point():
                if name in total and not torch.equal(total[name], value):
                    raise CheckpointError(
                        f"{path}: the non-floating-point entry {name} differs from the same entry of {paths[0]}"
                    )
                total[name] = value
                continue
            if not value.isfinite().all():
                raise CheckpointError(f"{path}: values of {name} are not finite; leave this checkpoint out of the average")
            dtypes.setdefault(name, value.dtype)
            total[name] = total[name] + value.double() if name in total else value.double()
    mean = {name: (value / len(paths)).to(dtypes[name]) if name in dtypes else value for name, value in total.items()}
    if overflown := next((name for name, value in mean.items() if name in dtypes and not value.isfinite().all()), None):
        raise CheckpointError(
            f"{paths[0]}: the average of {overflown} exceeds the range of its data type, {dtypes[overflown]}; list a file with "
            "float32 weights first, or leave out the checkpoint with extreme weights"
        )
    if unnamed and names:
        print(f"warning: {unnamed[0]} has no class names; its classes are assumed to be in the order of the other files")
    return {"model": mean, **metadata, **({"class_names": list(names)} if names else {})}


def check_same_config(first: object, other: object, first_path: Path, path: Path) -> None:
    """Check that the stored configs of two checkpoints describe the same model and normalisation.

    Only keys that both configs contain are compared.

    Raises:
        CheckpointError: a key with one of the ``COMPARED_KEY_PREFIXES`` differs.
    """
    if not (isinstance(first, Mapping) and isinstance(other, Mapping)):
        return
    before, after = flatten(first), flatten(other)
    for key in sorted(before.keys() & after.keys()):
        if key.startswith(COMPARED_KEY_PREFIXES) and show(before[key]) != show(after[key]):
            raise CheckpointError(
                f"{path}: {key} is {show(after[key])}, but {show(before[key])} in {first_path}; all checkpoints must have the "
                "same model, input size and normalisation"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="files, run directories, URLs, or released models")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="auto: for each file, raw or ema weights, whichever had the higher validation accuracy in training",
    )
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} already exists; choose another name")
    if len(args.checkpoints) < 2:
        parser.error(f"{args.checkpoints[0]}: only one checkpoint; give two or more to average")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(average([locate(reference) for reference in args.checkpoints], args.weights), args.output)
    except (CheckpointError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {printable(error)}\n")
    print(f"{args.output}: mean of {len(args.checkpoints)} checkpoints, sha256 {sha256(args.output)}")


if __name__ == "__main__":
    main()
