"""Classify unlabelled images. Write the top-k predictions as CSV and JSON, and a PNG of some images with their predictions.

Model, input size and class names are read from the checkpoint. Unreadable images are listed with the reason in the CSV, the
JSON and the log; the exit status is then 1.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils.config.loading import ConfigError, load_config
from utils.errors import TrainingError
from utils.text import csv_cell, escape, printable

GRID = 36  # maximum number of images in the PNG


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, help="image files or directories")
    parser.add_argument(
        "--resume", required=True, metavar="FILE", help="checkpoint: file, run directory, URL, or released model"
    )
    parser.add_argument("--cfg", nargs="+", action="extend", metavar="FILE", help="config (default: the checkpoint's own)")
    parser.add_argument("--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="config keys to override")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="output directory (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=5, help="predictions per image (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per forward pass (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default: %(default)s)")
    parser.add_argument(
        "--weights",
        choices=("raw", "ema", "auto"),
        default="auto",
        help="auto: raw or ema, whichever was more accurate in training",
    )
    args = parser.parse_args()
    for name in ("top_k", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for path in args.images:
        if not path.exists():
            parser.error(f"{path}: no such file or directory")
    return args


def run(args: argparse.Namespace) -> int:
    """Classify all images and write the results. Returns the number of unreadable images."""
    import torch

    from data.build import build_preprocessing
    from engine.report import draw_predictions
    from engine.run_directory import check_writable
    from jobs.evaluate import open_model
    from jobs.predict import class_names, find_images, predict
    from utils.log import setup_logging

    setup_logging(0)
    check_writable(args.output)
    images = find_images(args.images)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, checkpoint, cfg, label = open_model(args.resume, args.cfg, args.opts, weights=args.weights, device=device)
    preprocessing, names = build_preprocessing(cfg), class_names(checkpoint, cfg.MODEL.NUM_CLASSES)
    options = {"batch_size": args.batch_size, "num_workers": args.workers, "top_k": args.top_k}
    predictions = predict(model, images, preprocessing, device=device, **options)

    args.output.mkdir(parents=True, exist_ok=True)
    write_csv(args.output / "predictions.csv", predictions, names, min(args.top_k, len(names)))
    about = {
        "model": cfg.MODEL.NAME,
        "checkpoint": str(checkpoint.path),
        "sha256": checkpoint.digest,
        "weights": label,
        "preprocessing": preprocessing.to_dict(),
    }
    write_json(args.output / "predictions.json", predictions, names, about)
    readable = [prediction for prediction in predictions if prediction.error is None]
    written = ["predictions.csv", "predictions.json"]
    if readable:
        step = max(len(readable) / GRID, 1)  # show evenly spaced images, since images are often ordered by class
        shown = [readable[int(position * step)] for position in range(min(GRID, len(readable)))]
        captions = [f"{names[p.class_ids[0]]}: {100 * p.confidences[0]:.1f}\N{NO-BREAK SPACE}%" for p in shown]
        pictures = [read_thumbnail(p.image) for p in shown]
        draw_predictions(pictures, captions, args.output / "predictions.png")
        written.append("predictions.png")
    for prediction in readable[:10]:
        name = escape(names[prediction.class_ids[0]])
        print(f"{escape(str(prediction.image))}: {name} ({100 * prediction.confidences[0]:.1f} %)")
    if len(readable) > 10:
        print(f"... and {len(readable) - 10} more")
    unreadable = len(predictions) - len(readable)
    print(f"{len(readable)} of {len(predictions)} images classified, {unreadable} unreadable")
    print(f"{args.output}: {', '.join(written)}")
    return unreadable


def read_thumbnail(path: Path) -> "Image.Image":
    """Read an image at a size for the PNG: up to ``GRID`` images are in memory at a time."""
    from data.datasets import decode_image, read_file

    picture = decode_image(read_file(path))
    picture.thumbnail((512, 512))
    return picture


def write_csv(path: Path, predictions: list, names: list[str], top_k: int) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        columns = [f"{column}_{rank}" for rank in range(1, top_k + 1) for column in ("class", "confidence")]
        writer.writerow(["image", *columns, "error"])
        for prediction in predictions:
            pairs = zip(prediction.class_ids, prediction.confidences, strict=True)
            values = [value for class_id, confidence in pairs for value in (names[class_id], f"{confidence:.4f}")]
            row = [str(prediction.image), *(values or [""] * len(columns)), prediction.error or ""]
            writer.writerow(map(csv_cell, row))


def write_json(path: Path, predictions: list, names: list[str], about: dict) -> None:
    def record(prediction) -> dict:
        if prediction.error is not None:
            return {"image": str(prediction.image), "error": prediction.error}
        pairs = zip(prediction.class_ids, prediction.confidences, strict=True)
        top = [{"class_id": class_id, "class": names[class_id], "confidence": value} for class_id, value in pairs]
        return {"image": str(prediction.image), "predictions": top}

    records = about | {"images": [record(prediction) for prediction in predictions]}
    path.write_text(json.dumps(records, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def main() -> None:
    args = parse_arguments()
    try:
        if args.cfg:
            load_config(args.cfg, args.opts)  # reports config errors before torch is imported
        unreadable = run(args)
    except (ConfigError, TrainingError, ValueError, OSError) as error:
        print(f"predict.py: error: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(1 if unreadable else 0)


if __name__ == "__main__":
    main()
