"""Measure how focused a model's attention is, per block, head and form of attention, over a set of images.

A form of attention is a way to compute attention weights from the queries and keys of a block. The forms are the model's own
attention, the model's attention matrix plus its depthwise convolution written as a matrix, and softmax, linear, focused and
Efficient attention (https://arxiv.org/abs/1812.01243). The script writes focus.json (values per image), focus.csv (means per
head), report.md, measures.png with four measures per block, and ranks.png with the singular values of one attention matrix per
block for the first image, similar to the paper's figure about the rank of attention matrices.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils.config.loading import ConfigError
from utils.files import replacing
from utils.text import markdown, printable

# Measures in measures.png. "top 5 %" is the share of the attention weight on the 5 % of keys with the largest weights.
PLOTTED_MEASURES = ("entropy", "top 5 %", "distance", "effective rank")


def draw_measures(rows, path: Path) -> None:
    """Plot ``PLOTTED_MEASURES`` per block, with one line per form of attention."""
    from matplotlib.figure import Figure

    from analysis.summary import mean_over_heads

    blocks, forms = list(dict.fromkeys(row.block for row in rows)), list(dict.fromkeys(row.form for row in rows))
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, name in zip(axes.flat, PLOTTED_MEASURES, strict=True):
        for form in forms:
            values = [mean_over_heads(rows, block, form, name) for block in blocks]
            values = [float("nan") if value is None else value for value in values]
            axis.plot(values, "o-", label=form, markersize=4, linewidth=2 if form.startswith("own") else 1)
        axis.set(title=name, xlabel="block")
        axis.set_xticks(range(len(blocks)), blocks, rotation=60, ha="right", fontsize=6)
    axes[0, 0].legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def draw_ranks(model, image, names, path: Path) -> None:
    """Plot the singular values of one attention matrix per block, relative to the largest, with and without the convolution.

    The matrix is from the first head and, in blocks with windows or stripes, from the first window or stripe.
    """
    import torch
    from matplotlib.figure import Figure

    from analysis.maps import capture
    from analysis.measures import singular_values
    from analysis.summary import OWN, WITH_CONVOLUTION, evenly_spaced, matrices

    with torch.no_grad(), capture(model, names) as attentions:
        model(image.unsqueeze(0))
    columns = min(4, len(attentions))
    rows = math.ceil(len(attentions) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(attentions) :]:
        axis.axis("off")
    for axis, attention in zip(axes.flat, attentions, strict=False):
        weights = matrices(attention)
        for form in (OWN, WITH_CONVOLUTION):
            if form in weights:
                matrix = weights[form][0, 0]
                values = singular_values(matrix[evenly_spaced(len(matrix))][:, evenly_spaced(matrix.shape[1])])
                axis.semilogy(range(1, len(values) + 1), (values / values[0]).clamp(min=1e-9), label=form)
        if attention.is_linear:
            axis.axvline(attention.q.shape[-1], color="grey", linewidth=0.8, linestyle="--", label="head dimension")
        axis.set_title(attention.name, fontsize=7)
    axes[0, 0].legend(fontsize=6)
    figure.supylabel("singular value, relative to the largest")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def analyze(args: argparse.Namespace) -> None:
    from analysis.pages import module_names
    from analysis.summary import report, summarise, write_csv, write_json
    from engine.run_directory import check_writable
    from jobs.evaluate import open_model
    from jobs.inspect import InspectedImages
    from jobs.predict import find_images
    from utils.log import setup_logging
    from utils.progress import progress

    setup_logging(rank=0)
    check_writable(args.output)
    model, checkpoint, cfg, weights = open_model(args.resume, args.cfg, args.opts, weights=args.weights)
    names = module_names(model, args.blocks)
    images = InspectedImages(find_images(args.images)[:: args.every], cfg)
    normalised = (images.read(position)[1] for position in range(len(images)))
    rows = summarise(model, progress(normalised, len(images), "images"), names)
    about = {
        "model": cfg.MODEL.NAME,
        "weights": f"{weights} of {checkpoint.path}, sha256 {checkpoint.digest}",
        "images": f"{len(images)} from {', '.join(map(str, args.images))}",
        "input size": str(cfg.DATA.IMG_SIZE),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / "focus.json", rows, about)
    write_csv(args.output / "focus.csv", rows)
    (args.output / "report.md").write_text(
        report(rows, {name: markdown(value) for name, value in about.items()}), encoding="utf-8"
    )
    draw_measures(rows, args.output / "measures.png")
    draw_ranks(model, images.read(0)[1], names, args.output / "ranks.png")
    print(f"{args.output}: focus.json, focus.csv, report.md, measures.png, ranks.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--resume", required=True, metavar="FILE", help="checkpoint: file, run directory, URL, or released model"
    )
    parser.add_argument(
        "--cfg", nargs="+", action="extend", default=[], metavar="FILE", help="config (default: the checkpoint's own)"
    )
    parser.add_argument(
        "--images", nargs="+", action="extend", type=Path, required=True, metavar="PATH", help="image files or directories"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="use every N-th image")
    parser.add_argument("--output", type=Path, default=Path("focus"), help="output directory")
    parser.add_argument(
        "--blocks", nargs="+", action="extend", metavar="NAME", help="names or prefixes of attention modules (default: all)"
    )
    parser.add_argument(
        "--weights",
        choices=("raw", "ema", "auto"),
        default="auto",
        help="auto: raw or ema, whichever was more accurate in training",
    )
    parser.add_argument("--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="config keys to override")
    args = parser.parse_args()
    if args.every < 1:
        parser.error(f"--every {args.every}: must be at least 1")
    from data.files import DataError
    from models.checkpoints.reader import CheckpointError

    try:
        analyze(args)
    except (ConfigError, CheckpointError, DataError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {printable(error)}\n")


if __name__ == "__main__":
    main()
