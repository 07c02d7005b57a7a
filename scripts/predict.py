"""Classify unlabelled images. Write the top-k predictions as CSV and JSON, and a PNG of some images with their predictions.

Model, input size and class names are read from the checkpoint. Unreadable images are listed with the reason in the CSV, the
JSON and the log; the exit status is then 1.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.command_line import check_inputs, check_positive, create_parser, reporting_errors
from utils.errors import FAILED
from utils.files import write_csv, write_json
from utils.text import escape

GRID = 36  # maximum number of images in the PNG


def run(args: argparse.Namespace) -> int:
    """Classify all images and write the results. Returns the number of unreadable images."""
    import torch

    from data.build import build_preprocessing
    from engine.evaluation import augmented
    from engine.report import Caption, draw_predictions
    from engine.run_directory import check_writable
    from jobs.model import open_model
    from jobs.predict import class_names, find_images, predict, read_thumbnail, true_class
    from utils.log import setup_logging

    setup_logging(0)
    check_writable(args.output)
    images = find_images(args.images)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, checkpoint, cfg, label = open_model(args.resume, args.cfg, args.opts, weights=args.weights, device=device, tta=True)
    preprocessing, names = build_preprocessing(cfg), class_names(checkpoint, cfg.MODEL.NUM_CLASSES)
    options = {"batch_size": args.batch_size, "num_workers": args.workers, "top_k": args.top_k}
    predictions = predict(augmented(model, cfg.TEST.TTA), images, preprocessing, device=device, **options)
    readable = [prediction for prediction in predictions if prediction.error is None]
    truths = {prediction.image: true_class(prediction.image, checkpoint.class_names) for prediction in readable}

    args.output.mkdir(parents=True, exist_ok=True)
    about = {
        "model": cfg.MODEL.NAME,
        "checkpoint": str(checkpoint.path),
        "sha256": checkpoint.digest,
        "weights": label,
        "preprocessing": preprocessing.to_dict(),
        "tta": cfg.TEST.TTA,
    }
    write_results(args.output, predictions, names, about, min(args.top_k, len(names)))
    if readable:
        step = max(len(readable) / GRID, 1)  # show evenly spaced images, since images are often ordered by class
        shown = [readable[int(position * step)] for position in range(min(GRID, len(readable)))]
        captions = []
        for prediction in shown:
            best, truth = prediction.class_ids[0], truths[prediction.image]
            text = f"{names[best]}: {100 * prediction.confidences[0]:.1f}%"
            captions.append(Caption(prediction.image.name, text, None if truth is None else names[truth], best == truth))
        pictures = [read_thumbnail(prediction.image, exif=preprocessing.exif) for prediction in shown]
        draw_predictions(pictures, captions, args.output / "predictions.png")
    for prediction in readable[:10]:
        name = escape(names[prediction.class_ids[0]])
        print(f"{escape(str(prediction.image))}: {name} ({100 * prediction.confidences[0]:.1f} %)")
    if len(readable) > 10:
        print(f"... and {len(readable) - 10} more")
    unreadable = len(predictions) - len(readable)
    if known := sum(truth is not None for truth in truths.values()):
        correct = sum(prediction.class_ids[0] == truths[prediction.image] for prediction in readable)
        print(f"{correct} of {known} predictions are correct according to the directory names")
    print(f"{len(readable)} of {len(predictions)} images classified, {unreadable} unreadable")
    print(f"{args.output}: predictions.csv, predictions.json{', predictions.png' if readable else ''}")
    return unreadable


def write_results(output: Path, predictions: list, names: list[str], about: dict, top_k: int) -> None:
    """Write ``predictions.csv`` and ``predictions.json``; both give the error of an unreadable image."""
    columns = [f"{column}_{rank}" for rank in range(1, top_k + 1) for column in ("class", "confidence")]
    rows, records = [], []
    for prediction in predictions:
        image, pairs = str(prediction.image), list(zip(prediction.class_ids, prediction.confidences, strict=True))
        values = [value for class_id, confidence in pairs for value in (names[class_id], f"{confidence:.4f}")]
        rows.append([image, *(values or [""] * len(columns)), prediction.error or ""])
        top = [{"class_id": class_id, "class": names[class_id], "confidence": value} for class_id, value in pairs]
        records.append({"image": image} | ({"predictions": top} if top else {"error": prediction.error}))
    write_csv(output / "predictions.csv", ["image", *columns, "error"], rows)
    write_json(output / "predictions.json", about | {"images": records})


def main() -> None:
    parser = create_parser(__doc__, "--resume", "--cfg", "--opts", "--weights")
    parser.add_argument("images", nargs="+", type=Path, help="image files or directories")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="output directory (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=5, help="predictions per image (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per forward pass (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default: %(default)s)")
    args = parser.parse_args()
    with reporting_errors(parser):
        check_positive(args, "top-k", "batch-size")
        check_inputs(args)
        unreadable = run(args)
    sys.exit(FAILED if unreadable else 0)


if __name__ == "__main__":
    main()
