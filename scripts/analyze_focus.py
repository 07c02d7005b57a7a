"""Measure how focused a model's attention is, per block, head and form of attention, over a set of images.

A form of attention is a way to compute attention weights from the queries and keys of a block. The forms are the model's own
attention, the model's attention matrix plus its depthwise convolution written as a matrix, and softmax, linear, focused and
Efficient attention (https://arxiv.org/abs/1812.01243). The script writes focus.json (values per image), focus.csv (means per
head), report.md, measures.png with four measures per block, and ranks.png with the singular values of one attention matrix per
block for the first image, similar to the paper's figure about the rank of attention matrices.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.command_line import check_inputs, check_positive, create_parser, reporting_errors, save_figure
from utils.files import write_csv, write_json, write_text
from utils.text import markdown


def analyze(args: argparse.Namespace) -> None:
    from analysis.pages import module_names
    from analysis.pictures import draw_measures, draw_ranks
    from analysis.summary import HEADER, csv_rows, report, summarise
    from engine.run_directory import check_writable
    from jobs.inspect import InspectedImages
    from jobs.model import open_model
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
    write_json(args.output / "focus.json", about | {"rows": [vars(row) for row in rows]})
    write_csv(args.output / "focus.csv", HEADER, csv_rows(rows))
    write_text(args.output / "report.md", report(rows, {name: markdown(value) for name, value in about.items()}))
    save_figure(draw_measures(rows), args.output / "measures.png")
    save_figure(draw_ranks(model, images.read(0)[1], names), args.output / "ranks.png")
    print(f"{args.output}: focus.json, focus.csv, report.md, measures.png, ranks.png")


def main() -> None:
    parser = create_parser(__doc__, "--resume", "--cfg", "--images", "--blocks", "--weights", "--opts")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="use every N-th image")
    parser.add_argument("--output", type=Path, default=Path("focus"), help="output directory")
    args = parser.parse_args()
    with reporting_errors(parser):
        check_positive(args, "every")
        check_inputs(args)
        analyze(args)


if __name__ == "__main__":
    main()
