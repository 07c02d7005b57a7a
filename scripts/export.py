"""Export a trained model as safetensors with timm's config.json, as a torch.export program (.pt2), or as ONNX.

A model card (README.md) is also written to the directory. If safetensors is among the exported formats, timm can load the
directory: ``import flatten_transformer, timm; timm.create_model("local-dir:FOLDER", pretrained=True)``. The .pt2 and ONNX files
are loaded back and compared with the model; the exit status is 1 if their error exceeds the tolerance. ONNX needs three more
packages: pip install onnx onnxscript onnxruntime.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from yacs.config import CfgNode

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.build import build_preprocessing
from jobs.evaluate import OpenedModel, open_model
from jobs.locate_checkpoint import Checkpoint
from models import build_arguments
from models.checkpoints.reader import METADATA_KEY, WEIGHTS, CheckpointError, sha256
from utils.config.keys import RECIPE_KEY_PREFIXES
from utils.config.loading import ConfigError, image_size, to_dict
from utils.text import code_fence, markdown, markdown_code, printable

FORMATS = ("safetensors", "torch", "onnx")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # required by the format onnx
MAX_RELATIVE_ERROR = 1e-4  # maximum error of a logit, relative to the largest absolute logit or 1, whichever is greater
MAX_NAMES = 50  # maximum number of class names in the model card
BATCHES = (1, 3)  # batch sizes at which exported models are checked
INCOMPLETE = ".incomplete"  # suffix of the temporary directory


class ExportError(RuntimeError):
    """The export failed, or an exported file does not match the model."""


def export_torch(model: nn.Module, images: Tensor, path: Path) -> float:
    """Write a ``torch.export`` program with dynamic batch size. Returns its largest relative error on the images."""
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return _largest_error(model, torch.export.load(path).module(), images, path)


def export_onnx(model: nn.Module, images: Tensor, path: Path, metadata: dict[str, str] | None = None) -> float:
    """Write an ONNX file with input ``images``, output ``logits`` and dynamic batch size. Returns its largest relative error.

    Args:
        metadata: entries of the file's ``metadata_props``.
    """
    import onnx
    import onnxruntime

    # torch.onnx decomposes attention as the math backend does. Trace with that backend too: the outputs of other backends have
    # a different memory layout, which would not match the exported operations.
    with sdpa_kernel(SDPBackend.MATH):
        program = torch.onnx.export(
            model,
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    program.save(path)
    if metadata:
        proto = onnx.load(path)
        onnx.helper.set_model_props(proto, metadata)
        onnx.save(proto, path)
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return _largest_error(
        model, lambda batch: torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0]), images, path
    )


def _largest_error(model: nn.Module, exported, images: Tensor, path: Path) -> float:
    """Compare exported logits with the model's. Returns the largest relative error, as defined at ``MAX_RELATIVE_ERROR``.

    Raises:
        ExportError: the error exceeds ``MAX_RELATIVE_ERROR``.
    """
    errors = []
    with torch.inference_mode():
        for count in BATCHES:
            expected, actual = model(images[:count]), exported(images[:count])
            errors.append((actual - expected).abs().max() / expected.abs().max().clamp(min=1))
    error = torch.stack(errors).max().item()  # NaN if any error is NaN
    if not error <= MAX_RELATIVE_ERROR:
        raise ExportError(
            f"{path}: relative error {error:.2g} of the logits exceeds {MAX_RELATIVE_ERROR:.0e}; do not use this file"
        )
    return error


def timm_config(model: nn.Module, cfg: CfgNode, class_names: Sequence[str]) -> dict:
    """Contents of timm's ``config.json``: architecture, its arguments, and preprocessing.

    Args:
        model: built by ``build_model(cfg)``.
    """
    name, arguments = build_arguments(cfg)
    config = {
        "architecture": name,
        "num_classes": cfg.MODEL.NUM_CLASSES,
        "num_features": model.num_features,
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": {key: value for key, value in model.pretrained_cfg.items() if key != "architecture"},
    }
    if class_names:
        config["label_names"] = list(class_names)
    return config


def model_card(
    cfg: CfgNode, checkpoint: Checkpoint, label: str, files: dict[str, str], evaluation: dict | None, *, in_timm: bool
) -> str:
    """Text of the model card: files, input, classes, measured accuracy, usage and training recipe.

    Args:
        label: which weights were exported, raw or ema.
        files: dictionary from file name to description.
        evaluation: contents of an ``eval.json``; None if the accuracy was not measured.
        in_timm: show how to load the model with timm; requires that safetensors is among the exported formats.
    """
    lines = [f"# {markdown(cfg.MODEL.NAME)}", ""]
    lines += [f"{label} weights of {markdown_code(checkpoint.path.name)}, sha256 `{checkpoint.digest}`.", ""]
    lines += ["| file | |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in files.items()), ""]
    preprocessing = build_preprocessing(cfg)
    lines += [
        f"Input: RGB, {preprocessing}, scaled to [0, 1], mean {list(preprocessing.mean)}, std {list(preprocessing.std)}. "
        f"Output: logits of {cfg.MODEL.NUM_CLASSES} classes.",
        "",
    ]
    if checkpoint.class_names:
        shown = ", ".join(map(markdown, checkpoint.class_names[:MAX_NAMES]))
        more = len(checkpoint.class_names) - MAX_NAMES
        lines += ["## Classes", "", shown + (f", and {more} more in `config.json`" if more > 0 else ""), ""]
    lines += ["## Accuracy", ""]
    if evaluation is None:
        lines += ["Not measured: evaluate the checkpoint (`--eval`), and export again with its `eval.json`."]
    else:
        result = evaluation["results"][label]
        low, high = result["acc1_interval_95"]
        top5 = f", top-5 {result['acc5']:.3f} % ({result['correct5']} images)" if cfg.MODEL.NUM_CLASSES > 5 else ""
        lines += [
            f"Top-1 {result['acc1']:.3f} % (95 % confidence interval {low:.2f} to {high:.2f}; {result['correct1']} of "
            f"{result['num_images']} images){top5}, measured on "
            f"{markdown_code(Path(evaluation['data']).name)} in {markdown_code(evaluation['precision'])} with torch "
            f"{markdown_code(evaluation['versions']['torch'])}."
        ]
    package = "After `pip install` of the FLatten repository (or, in its root, with `import models`):"
    lines += ["", "## Use", "", package if in_timm else "In the root of the FLatten repository:", "", "```python"]
    if in_timm:
        lines += ["import flatten_transformer  # registers the architecture with timm", "import timm", ""]
        lines += ['model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()']
        lines += ["transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"]
    else:
        lines += ["from models import build_model", "from utils.config.loading import load_config", ""]
        lines += ['model = build_model(load_config("config.yaml"))']
    recipe = cfg.dump().rstrip()
    lines += ["```", "", "## Recipe", "", f"{code_fence(recipe)}yaml", recipe, code_fence(recipe), ""]
    return "\n".join(lines)


def find_evaluation(path: Path | None, checkpoint: Checkpoint, label: str) -> dict | None:
    """Read the ``eval.json`` at ``path``; if ``path`` is None, read the one next to the checkpoint.

    Without a path, return None if there is no readable file, or if it belongs to another checkpoint or other weights.

    Raises:
        ExportError: the file at ``path`` cannot be read, or belongs to another checkpoint or other weights.
    """
    if path is not None:
        return read_evaluation(path, checkpoint.digest, label)
    try:
        return read_evaluation(checkpoint.path.with_name("eval.json"), checkpoint.digest, label)
    except ExportError:
        return None


def read_evaluation(path: Path, digest: str, label: str) -> dict:
    """Read an ``eval.json``, and check that it belongs to the checkpoint.

    Raises:
        ExportError: the file cannot be read, or belongs to another checkpoint or other weights.
    """
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        check_evaluation(evaluation, label)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ExportError(f"{path} is not readable as an eval.json ({reason}); evaluate the checkpoint again") from None
    if evaluation["sha256"] != digest or label not in evaluation["results"]:
        raise ExportError(f"{path} belongs to another checkpoint or other weights; evaluate the exported checkpoint")
    return evaluation


def check_evaluation(evaluation: dict, label: str) -> None:
    """Check the types of the entries of an ``eval.json`` that the model card shows.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: an entry is missing or invalid.
    """
    texts = [evaluation["sha256"], evaluation["data"], evaluation["precision"], evaluation["versions"]["torch"]]
    if label in evaluation["results"]:
        result = evaluation["results"][label]
        low, high = result["acc1_interval_95"]
        numbers = [low, high, *(result[key] for key in ("acc1", "acc5", "correct1", "correct5", "num_images"))]
        if not all(type(number) in (int, float) and 0 <= number < 2**53 for number in numbers):
            raise ValueError(f"the results of the {label} weights are not numbers")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("sha256, data, precision or versions is not text")


def write_safetensors(model: nn.Module, path: Path, cfg: CfgNode, label: str, class_names: Sequence[str]) -> None:
    """Write the weights, with config and class names as metadata, so that the file is self-contained."""
    contents = {"config": to_dict(cfg), "class_names": list(class_names)}
    metadata = {"format": "pt", "model": cfg.MODEL.NAME, "weights": label, METADATA_KEY: json.dumps(contents, allow_nan=False)}
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    path.write_bytes(save(state, metadata=metadata))


def export(args: argparse.Namespace) -> dict[str, str]:
    """Export a checkpoint in all requested formats. Returns a dictionary from file name to description.

    The files appear in the directory when all of them are complete; a failed export leaves nothing.

    Raises:
        ExportError: an exported file does not match the model.
        ConfigError, CheckpointError: the directory is not empty, a package is missing, or config and checkpoint do not match.
    """
    folder = Path(os.path.realpath(args.folder))
    if os.path.lexists(folder) and (not folder.is_dir() or any(path.suffix != INCOMPLETE for path in folder.iterdir())):
        raise ConfigError(f"{args.folder} is not an empty directory; choose another directory")
    if "onnx" in args.formats and (missing := [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]):
        raise ConfigError(f"--formats onnx: not installed: {', '.join(missing)}; run pip install {' '.join(ONNX_PACKAGES)}")
    opened = open_model(args.checkpoint, args.cfg, args.opts, weights=args.weights, prefixes=RECIPE_KEY_PREFIXES)
    evaluation = find_evaluation(args.eval_json, opened.checkpoint, opened.weights)
    num_names = len(opened.checkpoint.class_names)
    if num_names not in (0, opened.cfg.MODEL.NUM_CLASSES):
        raise CheckpointError(
            f"{opened.checkpoint.path} has {num_names} class names, but {opened.cfg.MODEL.NUM_CLASSES} classes; repair it"
        )
    temporary = create_temporary_directory(folder)
    try:
        files = write_files(temporary, opened, args.formats)
        in_timm = "safetensors" in args.formats
        card = model_card(opened.cfg, opened.checkpoint, opened.weights, files, evaluation, in_timm=in_timm)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for path in list(temporary.iterdir()):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return files


def create_temporary_directory(folder: Path) -> Path:
    """Create a temporary directory on the file system of ``folder``, and delete those that killed exports left there.

    Raises:
        ConfigError: the file system cannot be written.
    """
    parent = folder if folder.is_dir() else folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"*{INCOMPLETE}"):
            shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=".export.", suffix=INCOMPLETE, dir=parent))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be created ({error.strerror}); choose another directory") from None


def write_files(folder: Path, opened: OpenedModel, formats: Sequence[str]) -> dict[str, str]:
    """Write the requested formats and the config to a directory. Returns a dictionary from file name to description.

    Raises:
        ExportError: an exported file does not match the model.
        CheckpointError: the outputs of the model are not finite.
    """
    model, checkpoint, cfg, label = opened
    names = checkpoint.class_names
    images = torch.randn(max(BATCHES), 3, *image_size(cfg), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        if not model(images[:1]).isfinite().all():
            raise CheckpointError(f"{checkpoint.path}: the outputs of the model are not finite; export another checkpoint")
    files = {"config.yaml": "the resolved config"}
    (folder / "config.yaml").write_text(cfg.dump(), encoding="utf-8")
    if "safetensors" in formats:
        path = folder / "model.safetensors"
        write_safetensors(model, path, cfg, label, names)
        files[path.name] = f"weights, sha256 `{sha256(path)}`"
        (folder / "config.json").write_text(json.dumps(timm_config(model, cfg, names), indent=2, allow_nan=False) + "\n")
        files["config.json"] = "architecture and preprocessing, for timm"
    if "torch" in formats:
        path = folder / "model.pt2"
        error = export_torch(model, images, path)
        files[path.name] = f"largest relative error of the logits {error:.1e}, sha256 `{sha256(path)}`"
    if "onnx" in formats:
        path = folder / "model.onnx"
        metadata = {"model": cfg.MODEL.NAME, "weights": label, "class_names": json.dumps(names)}
        metadata["preprocessing"] = json.dumps(build_preprocessing(cfg).to_dict())
        error = export_onnx(model, images, path, metadata)
        files[path.name] = f"largest relative error of the logits {error:.1e}, sha256 `{sha256(path)}`"
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="file, run directory, URL, or released model")
    parser.add_argument("folder", type=Path, help="output directory; must be empty or new")
    parser.add_argument("--cfg", nargs="+", action="extend", metavar="FILE", help="config (default: the checkpoint's own)")
    parser.add_argument("--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="config keys to override")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["safetensors"])
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="auto", help="auto: raw or ema, whichever was more accurate in training"
    )
    parser.add_argument(
        "--eval-json",
        type=Path,
        metavar="FILE",
        help="eval.json with the accuracy for the model card (default: the one next to the checkpoint)",
    )
    args = parser.parse_args()
    try:
        files = export(args)
    except ExportError as error:
        parser.exit(1, f"{parser.prog}: error: {printable(error)}\n")
    except (ConfigError, CheckpointError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {printable(error)}\n")
    for name, text in files.items():
        print(f"{printable(args.folder / name)}: {text}")
    print(f"{printable(args.folder / 'README.md')}: model card")


if __name__ == "__main__":
    main()
