"""Take a trained model out: safetensors with a model card, torch.export (.pt2), ONNX.

Whatever computes is loaded back and held against the model itself; an error above the bound ends with status 1. ONNX needs
three more packages: pip install onnx onnxscript onnxruntime.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.transforms import resized_side
from models import build_model
from utils.checkpoint import load_weights
from utils.config import ConfigError, load_config
from weights.reader import WEIGHTS, CheckpointError, sha256

FORMATS = ("safetensors", "torch", "onnx")
LARGEST_ERROR = 1e-4  # of a logit, over the largest logit or 1
BATCHES = (1, 3)  # images that exported models are tried on


class ExportError(RuntimeError):
    """An exported model that is not the model."""


def export_torch(model: nn.Module, images: Tensor, path: Path) -> float:
    """A program for ``torch.export.load``, with any batch size. Returns its largest error on the images."""
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return _largest_error(model, torch.export.load(path).module(), images, path)


def export_onnx(model: nn.Module, images: Tensor, path: Path) -> float:
    """A file for onnxruntime, input ``images`` and output ``logits``, with any batch size. Returns its largest error."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise ExportError(f"{error.name} is not installed; pip install onnx onnxscript onnxruntime") from None
    with sdpa_kernel(SDPBackend.MATH):  # whose memory layout the decomposed attention has too
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
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return _largest_error(
        model, lambda batch: torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0]), images, path
    )


def _largest_error(model: nn.Module, exported, images: Tensor, path: Path) -> float:
    """
    Raises:
        ExportError: it is above ``LARGEST_ERROR``.
    """
    errors = []
    with torch.inference_mode():
        for count in BATCHES:
            expected, found = model(images[:count]), exported(images[:count])
            errors.append((found - expected).abs().max() / expected.abs().max().clamp(min=1))
    error = torch.stack(errors).max().item()  # NaN where one is
    if not error <= LARGEST_ERROR:
        raise ExportError(
            f"{path}: its logits are off by {error:.2g} of the largest, more than {LARGEST_ERROR:.0e}; do not use it"
        )
    return error


def model_card(cfg, report, files: dict[str, str], evaluation: dict | None) -> str:
    """What was exported, from what, how it was trained, and what it was measured to do."""
    lines = [f"# {cfg.MODEL.NAME}", ""]
    lines += [f"{report.weights} weights of `{Path(report.path).name}`, sha256 `{sha256(Path(report.path))}`.", ""]
    lines += ["| file | |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in files.items()), ""]
    resized = resized_side(cfg.DATA.IMG_SIZE, crop=cfg.TEST.CROP)
    lines += [
        f"Input: RGB, {cfg.DATA.IMG_SIZE} x {cfg.DATA.IMG_SIZE} pixels (the centre of the image resized to "
        f"{resized} x {resized}, {cfg.DATA.INTERPOLATION}), values in [0, 1], "
        f"less {cfg.DATA.MEAN}, over {cfg.DATA.STD}. Output: logits of {cfg.MODEL.NUM_CLASSES} classes.",
        "",
        "## Accuracy",
        "",
    ]
    if evaluation is None:
        lines += ["Not measured: evaluate the checkpoint (`--eval`), and give its `eval.json`."]
    else:
        result = evaluation["results"][report.weights]
        low, high = result["acc1_interval_95"]
        lines += [
            f"Top-1 {result['acc1']:.3f} % (95 %: {low:.2f} to {high:.2f}), top-5 {result['acc5']:.3f} %: "
            f"{result['correct1']} and {result['correct5']} of {result['num_images']} images of "
            f"`{Path(evaluation['data']).name}`, in {evaluation['precision']}, torch {evaluation['versions']['torch']}."
        ]
    lines += ["", "## Use", "", "```python", "from models import build_model", "from utils.checkpoint import load_weights"]
    lines += ["from utils.config import load_config", "", 'model = build_model(load_config("config.yaml"))']
    lines += ['load_weights(model, "model.safetensors")', "```", "", "## Recipe", "", "```yaml", cfg.dump().rstrip(), "```", ""]
    return "\n".join(lines)


def read_evaluation(path: Path, checkpoint: Path, weights: str) -> dict:
    """An ``eval.json``, which must be of the checkpoint.

    Raises:
        ExportError: it is of another file, or of other weights.
    """
    try:
        evaluation = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read ({error}); --eval-json names the eval.json of an evaluation") from None
    if evaluation["sha256"] != sha256(checkpoint) or weights not in evaluation["results"]:
        raise ExportError(f"{path}: is of another file than {checkpoint}, or of other weights; evaluate this one")
    return evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, help="to write to; must be empty or new")
    parser.add_argument("--cfg", nargs="+", required=True, metavar="FILE", help="the config that it was trained with")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config keys to override")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["safetensors"])
    parser.add_argument("--weights", choices=WEIGHTS, default="auto", help="auto: the EMA where there is one")
    parser.add_argument("--eval-json", type=Path, metavar="FILE", help="of this checkpoint's evaluation, for the model card")
    args = parser.parse_args()
    try:
        cfg = load_config(args.cfg, args.opts)
        if args.folder.is_dir() and any(args.folder.iterdir()):
            raise ConfigError(f"{args.folder}: is not empty; choose another folder")
        model = build_model(cfg).eval()
        report = load_weights(model, args.checkpoint, weights=args.weights)
        if report.missing or report.reinitialised:
            raise CheckpointError(f"{report}; choose the config that this file was trained with")
        evaluation = read_evaluation(args.eval_json, args.checkpoint, report.weights) if args.eval_json else None
        files = {"config.yaml": "the resolved config"}
        args.folder.mkdir(parents=True, exist_ok=True)
        (args.folder / "config.yaml").write_text(cfg.dump())
        if "safetensors" in args.formats:
            path = args.folder / "model.safetensors"
            state = {name: value.contiguous() for name, value in model.state_dict().items()}
            path.write_bytes(save(state, metadata={"format": "pt", "model": cfg.MODEL.NAME, "weights": report.weights}))
            files[path.name] = f"weights, sha256 `{sha256(path)}`"
        images = torch.randn(max(BATCHES), 3, cfg.DATA.IMG_SIZE, cfg.DATA.IMG_SIZE, generator=torch.Generator().manual_seed(0))
        for name, suffix, export in (("torch", "pt2", export_torch), ("onnx", "onnx", export_onnx)):
            if name in args.formats:
                path = args.folder / f"model.{suffix}"
                error = export(model, images, path)
                files[path.name] = f"largest error {error:.1e}, sha256 `{sha256(path)}`"
        (args.folder / "README.md").write_text(model_card(cfg, report, files, evaluation))
    except ExportError as error:
        print(f"export.py: error: {error}", file=sys.stderr)
        sys.exit(1)
    except (ConfigError, CheckpointError, ValueError) as error:
        print(f"export.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    for name, text in files.items():
        print(f"{args.folder / name}: {text}")
    print(f"{args.folder / 'README.md'}: model card")


if __name__ == "__main__":
    main()
