"""Export a checkpoint as safetensors for timm, as a torch.export program, or as ONNX, with a model card."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from yacs.config import CfgNode

from data.build import build_preprocessing
from engine.evaluation import MAX_CLASSES_WITHOUT_TOP5
from jobs.early_checks import INCOMPLETE
from jobs.hub import EVALUATION, Publication, card_header, stored_conditions, stored_split
from jobs.locate_checkpoint import Checkpoint
from jobs.model import OpenedModel, open_model
from models import build_arguments
from models.checkpoints.reader import METADATA_KEY, CheckpointError, sha256
from utils.config.keys import KEYS, RECIPE_KEY_PREFIXES
from utils.config.loading import image_size, to_dict
from utils.config.training_keys import TIMM_PREFIX
from utils.errors import ConfigError
from utils.files import write_json
from utils.text import code_fence, markdown, markdown_code

MAX_RELATIVE_ERROR = 1e-4  # maximum error of a logit, relative to the largest absolute logit or 1, whichever is greater
MAX_NAMES = 50  # maximum number of class names in the model card
BATCHES = (1, 3)  # batch sizes at which exported models are checked
USE_WITH_TIMM = """import flatten_transformer  # registers the architecture with timm
import timm

model = timm.create_model("{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"""
USE_CONFIG = """from models import build_model
from utils.config import load_config

model = build_model(load_config("config.yaml"))"""


class ExportError(RuntimeError):
    """The export failed, or an exported file does not match the model."""


def export(
    checkpoint: str,
    folder: Path,
    *,
    cfg: Sequence[str] | None,
    opts: Sequence,
    weights: str,
    formats: Sequence[str],
    eval_json: Path | None,
    publication: Publication,
) -> dict[str, str]:
    """Export a checkpoint. The files appear in the directory when all are complete; a failed export leaves nothing.

    Args:
        checkpoint: in any form that --resume accepts.
        folder: output directory; must be empty or new, see ``jobs.early_checks.check_export``.
        cfg, opts, weights: see ``open_model``.
        formats: among ``FORMATS``.
        eval_json: result of an evaluation for the model card; None for the ``eval.json`` next to the checkpoint, if any.
        publication: for the model card.

    Returns:
        A dictionary from file name to description.

    Raises:
        ExportError: an exported file does not match the model, or ``eval_json`` does not match the checkpoint.
        ConfigError, CheckpointError: the directory cannot be written, or config and checkpoint do not match.
    """
    target = Path(os.path.realpath(folder))
    opened = open_model(checkpoint, cfg, opts, weights=weights, prefixes=RECIPE_KEY_PREFIXES)
    opened = opened._replace(cfg=published_config(opened.cfg))
    evaluation = find_evaluation(eval_json, opened.checkpoint, opened.weights)
    num_names, num_classes = len(opened.checkpoint.class_names), opened.cfg.MODEL.NUM_CLASSES
    if num_names not in (0, num_classes):
        raise CheckpointError(f"{opened.checkpoint.path} has {num_names} class names, but {num_classes} classes; repair it")
    temporary = create_temporary_directory(target)
    try:
        files = write_files(temporary, opened, formats)
        if evaluation is not None:
            write_json(temporary / EVALUATION, published_evaluation(evaluation, opened.weights))
            files[EVALUATION] = "the evaluation that measured the accuracy below"
        card = model_card(
            opened.cfg,
            opened.checkpoint,
            opened.weights,
            files,
            evaluation,
            in_timm="safetensors" in formats,
            publication=publication,
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
        target.mkdir(exist_ok=True)
        for path in list(temporary.iterdir()):
            os.replace(path, target / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return files


def published_config(cfg: CfgNode) -> CfgNode:
    """The config without paths of this machine: they have their default values, and a teacher on this machine only its name."""
    published = cfg.clone()
    published.defrost()
    for name, key in KEYS.items():
        if key.is_path and name != "TRAIN.TEACHER":
            *sections, leaf = name.split(".")
            reduce(getitem, sections, published)[leaf] = key.default
    teacher, local = cfg.TRAIN.TEACHER, f"{TIMM_PREFIX}local-dir:"
    prefix = local if teacher.startswith(local) else ""
    if prefix or not teacher.startswith(TIMM_PREFIX):
        published.TRAIN.TEACHER = prefix + Path(teacher.removeprefix(prefix)).name
    published.freeze()
    return published


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
        write_json(folder / "config.json", timm_config(model, cfg, names))
        files |= {path.name: f"weights, sha256 `{sha256(path)}`", "config.json": "architecture and preprocessing, for timm"}
    errors = {}
    if "torch" in formats:
        errors["model.pt2"] = export_torch(model, images, folder / "model.pt2")
    if "onnx" in formats:
        metadata = {"model": cfg.MODEL.NAME, "weights": label, "class_names": json.dumps(names)}
        metadata["preprocessing"] = json.dumps(build_preprocessing(cfg).to_dict())
        errors["model.onnx"] = export_onnx(model, images, folder / "model.onnx", metadata)
    for name, error in errors.items():
        files[name] = f"largest relative error of the logits {error:.1e}, sha256 `{sha256(folder / name)}`"
    return files


def write_safetensors(model: nn.Module, path: Path, cfg: CfgNode, label: str, class_names: Sequence[str]) -> None:
    """Write the weights, with config and class names as metadata, so that the file is self-contained."""
    contents = {"config": to_dict(cfg), "class_names": list(class_names)}
    metadata = {"format": "pt", "model": cfg.MODEL.NAME, "weights": label, METADATA_KEY: json.dumps(contents, allow_nan=False)}
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    path.write_bytes(save(state, metadata=metadata))


def timm_config(model: Any, cfg: CfgNode, class_names: Sequence[str]) -> dict:
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
    return config | ({"label_names": list(class_names)} if class_names else {})


def export_torch(model: nn.Module, images: Tensor, path: Path) -> float:
    """Write a ``torch.export`` program with dynamic batch size. Returns its largest relative error on the images."""
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return largest_error(model, torch.export.load(path).module(), images, path)


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
        program: Any = torch.onnx.export(
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
    return largest_error(
        model, lambda batch: torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0]), images, path
    )


def largest_error(model: nn.Module, exported: Callable[[Tensor], Tensor], images: Tensor, path: Path) -> float:
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


def find_evaluation(path: Path | None, checkpoint: Checkpoint, label: str) -> dict | None:
    """Read the ``eval.json`` at ``path``; without a path, the one next to the checkpoint, or None if it cannot be used.

    Raises:
        ExportError: the file at ``path`` cannot be read, or belongs to another checkpoint or other weights.
    """
    chosen = path or checkpoint.path.with_name("eval.json")
    try:
        evaluation = json.loads(chosen.read_text(encoding="utf-8"))
        check_evaluation(evaluation, label)
        if evaluation["sha256"] == checkpoint.digest and label in evaluation["results"]:
            return evaluation
        problem = "belongs to another checkpoint or other weights; evaluate the exported checkpoint"
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        problem = f"is not readable as an eval.json ({type(error).__name__}: {error}); evaluate the checkpoint again"
    if path is None:
        return None
    raise ExportError(f"{path} {problem}")


def check_evaluation(evaluation: dict, label: str) -> None:
    """Check the types of the entries of an ``eval.json`` that the model card shows.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: an entry is missing or invalid.
    """
    texts = [evaluation["sha256"], evaluation["data"], evaluation["precision"], evaluation["versions"]["torch"]]
    if not all(isinstance(text, str) for text in [*texts, stored_split(evaluation)]):
        raise ValueError("sha256, data, split, precision or versions is not text")
    if label in evaluation["results"]:
        result = evaluation["results"][label]
        low, high = result["acc1_interval_95"]
        numbers = [low, high, *(result[key] for key in ("acc1", "acc5", "correct1", "correct5", "num_images"))]
        if not all(type(number) in (int, float) and 0 <= number < 2**53 for number in numbers):
            raise ValueError(f"the results of the {label} weights are not numbers")


def published_evaluation(evaluation: dict, label: str) -> dict:
    """The entries of an ``eval.json`` that concern the exported weights, without paths of this machine."""
    kept = {
        key: evaluation[key]
        for key in ("sha256", "split", "val_fraction", "precision", "restriction", "tta")
        if evaluation.get(key)
    }
    kept |= {"data": Path(evaluation["data"]).name, "versions": {"torch": evaluation["versions"]["torch"]}}
    return kept | {"results": {label: evaluation["results"][label]}}


def model_card(
    cfg: CfgNode,
    checkpoint: Checkpoint,
    label: str,
    files: dict[str, str],
    evaluation: dict | None,
    *,
    in_timm: bool,
    publication: Publication,
) -> str:
    """Text of the model card: header for the hub, files, input, classes, measured accuracy, usage and training recipe.

    Args:
        label: which weights were exported, raw or ema.
        files: dictionary from file name to description.
        evaluation: contents of an ``eval.json``; None if the accuracy was not measured.
        in_timm: show how to load the model with timm; requires that safetensors is among the exported formats.
    """
    preprocessing, recipe = build_preprocessing(cfg), cfg.dump().rstrip()
    table = "\n".join(["| file | |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in files.items())])
    parts = [
        card_header(cfg.MODEL.NAME, publication, evaluation, label, in_timm=in_timm),
        f"# {markdown(cfg.MODEL.NAME)}",
        f"{label} weights of {markdown_code(checkpoint.path.name)}, sha256 `{checkpoint.digest}`.",
        table,
        f"Input: RGB, {preprocessing}, scaled to [0, 1], mean {list(preprocessing.mean)}, std {list(preprocessing.std)}. "
        f"Output: logits of {cfg.MODEL.NUM_CLASSES} classes.",
    ]
    if checkpoint.class_names:
        more = len(checkpoint.class_names) - MAX_NAMES
        shown = ", ".join(map(markdown, checkpoint.class_names[:MAX_NAMES]))
        parts += ["## Classes", shown + (f", and {more} more in `config.json`" if more > 0 else "")]
    else:
        parts += ["## Classes", "The checkpoint has no class names; classes are numbered in the order of its training data."]
    parts += ["## Accuracy", describe_accuracy(evaluation, label, cfg.MODEL.NUM_CLASSES)]
    installed = "After `pip install` of the FLatten repository (or, in its root, with `import models`):"
    parts += ["## Use", installed if in_timm else "In the root of the FLatten repository:"]
    source = f"hf-hub:{publication.repository}" if publication.repository else "local-dir:FOLDER"
    parts += [f"```python\n{USE_WITH_TIMM.format(name=source) if in_timm else USE_CONFIG}\n```"]
    if preprocessing.exif:
        parts += ["The model was trained on images that are turned upright: `image = PIL.ImageOps.exif_transpose(image)`."]
    fence = code_fence(recipe)
    parts += ["## Recipe", f"{fence}yaml\n{recipe}\n{fence}"]
    return "\n\n".join(parts) + "\n"


def describe_accuracy(evaluation: dict | None, label: str, num_classes: int) -> str:
    if evaluation is None:
        return "Not measured: evaluate the checkpoint (`--eval`), and export again with its `eval.json`."
    result = evaluation["results"][label]
    low, high = result["acc1_interval_95"]
    conditions = stored_conditions(evaluation)
    conditions = f", {markdown(conditions)}" if conditions else ""
    top5 = f", top-5 {result['acc5']:.3f} % ({result['correct5']} images)" if num_classes > MAX_CLASSES_WITHOUT_TOP5 else ""
    split = stored_split(evaluation)
    data = markdown_code(Path(evaluation["data"]).name or "unknown") + (f" ({markdown(split)})" if split else "")
    return (
        f"Top-1 {result['acc1']:.3f} % (95 % confidence interval {low:.2f} to {high:.2f}; {result['correct1']} of "
        f"{result['num_images']} images){top5}{conditions}, measured on {data} in "
        f"{markdown_code(evaluation['precision'])} with torch {markdown_code(evaluation['versions']['torch'])}."
    )
