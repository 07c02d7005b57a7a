"""Draw the attention maps of a model: one HTML page per image, and two PNG files per image and block.

The page works offline. Click a patch or use the arrow keys to select the query. Menus select the block, the head and the form
of attention: the model's own attention, its depthwise convolution, the sum of both, or softmax, linear, focused or Efficient
attention (https://arxiv.org/abs/1812.01243) computed from the same queries and keys. <image>_<block>.png shows all forms side
by side for a few queries. <image>_<block>_overlay.png shows the model's own attention and the kernel of its depthwise
convolution, drawn over the image.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.command_line import check_inputs, create_parser, reporting_errors, save_figure
from utils.errors import ConfigError
from utils.text import printable


def parse_point(text: str) -> tuple[int, int]:
    """Parse ``ROW,COLUMN``, the position of a pixel."""
    try:
        row, column = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give ROW,COLUMN in pixels, such as 112,60") from None
    return row, column


def as_fractions(pixels: list[tuple[int, int]], height: int, width: int) -> list[tuple[float, float]]:
    """Convert pixels to fractions of the image's height and width.

    Raises:
        ConfigError: a pixel is outside the image.
    """
    for row, column in pixels:
        if not (0 <= row < height and 0 <= column < width):
            raise ConfigError(f"--queries {row},{column}: outside the model's input of {height} x {width} pixels")
    return [((row + 0.5) / height, (column + 0.5) / width) for row, column in pixels]


def open_at_token_grid(args: argparse.Namespace):
    """Open the model. If --token-grid is set, choose the input size so that the token map of the first block has this size."""
    from jobs.model import open_model

    inspected = open_model(args.resume, args.cfg, args.opts, weights=args.weights)
    if not args.token_grid:
        return inspected
    stride = inspected.model.feature_info[0]["reduction"]
    height, width = (stride * args.token_grid[index] for index in (0, -1))  # a single number is used for both
    return open_model(args.resume, args.cfg, [*args.opts, "DATA.IMG_SIZE", [height, width]], weights=args.weights)


def unique_stems(paths: Sequence[Path]) -> list[str]:
    """Names of the files without extension, different for each path: _2, _3, ... is appended to repeated names."""
    stems: list[str] = []
    for path in paths:
        candidates = (f"{path.stem}_{number}" for number in itertools.count(2))
        stems.append(next(stem for stem in itertools.chain([path.stem], candidates) if stem not in stems))
    return stems


def visualize(args: argparse.Namespace) -> None:
    from analysis.pages import module_names, trace, write_page
    from analysis.pictures import POINTS, draw_forms, draw_overlays
    from engine.run_directory import check_writable
    from jobs.inspect import InspectedImages
    from jobs.predict import find_images
    from utils.config.loading import image_size

    check_writable(args.output)
    model, checkpoint, cfg, weights = open_at_token_grid(args)
    names = module_names(model, args.blocks)
    images = InspectedImages(find_images(args.images), cfg)
    points = as_fractions(args.queries, *image_size(cfg))
    args.output.mkdir(parents=True, exist_ok=True)
    for position, (path, name) in enumerate(zip(images.paths, unique_stems(images.paths), strict=True)):
        picture, image = images.read(position)
        blocks = trace(model, image, names, points=points)
        page = args.output / f"{name}.html"
        write_page(page, picture, blocks, f"{cfg.MODEL.NAME}, {weights} weights of {checkpoint.path.name}, {path.name}")
        for block in blocks:
            save_figure(draw_forms(picture, block, points or POINTS), args.output / f"{name}_{block.name}.png")
            save_figure(draw_overlays(picture, block, points or POINTS), args.output / f"{name}_{block.name}_overlay.png")
        print(f"{printable(page)}: {printable(path)}, blocks {len(blocks)}, {page.stat().st_size / 2**20:.1f} MiB")


def main() -> None:
    parser = create_parser(__doc__, "--resume", "--cfg", "--images", "--blocks", "--weights", "--opts")
    parser.add_argument("--output", type=Path, default=Path("attention"), help="output directory")
    parser.add_argument(
        "--queries",
        nargs="+",
        type=parse_point,
        default=[],
        metavar="ROW,COLUMN",
        help="show the queries at these pixels of the model's input in the PNG files (default: four points)",
    )
    parser.add_argument(
        "--token-grid",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="height and width of the first block's token map, or one number for both; the input size is chosen accordingly "
        "(default: the input size is DATA.IMG_SIZE)",
    )
    args = parser.parse_args()
    with reporting_errors(parser):
        if len(args.token_grid) > 2 or any(side < 1 for side in args.token_grid):
            raise ConfigError(f"--token-grid {' '.join(map(str, args.token_grid))}: give one or two numbers above 0")
        check_inputs(args)
        visualize(args)


if __name__ == "__main__":
    main()
