"""Draw what a model attends to: an HTML page to explore, and pictures, for each image.

The page shows the photograph; click a patch or use the arrow keys to choose the query, and choose block, head and form of
attention: the model's own, the convolution, their sum, and what softmax, linear, focused and Efficient attention compute from
the same queries and keys. It needs no network. The pictures show some queries of each block side by side.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils.config import ConfigError


def draw_maps(image, block, path: Path, num_queries: int = 4) -> None:
    """Queries in rows; the image, then each form of attention, averaged over heads, in columns."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from utils.files import replacing

    rows = [round((row + 0.5) * len(block.queries) / num_queries) for row in range(num_queries)]
    forms = list(block.maps)
    figure, axes = plt.subplots(
        num_queries, 1 + len(forms), figsize=(2 * (1 + len(forms)), 2.1 * num_queries), squeeze=False, constrained_layout=True
    )
    for axis in axes.flat:
        axis.axis("off")
    for cells, row in zip(axes, rows, strict=True):
        y, x = ((place + 0.5) / side for place, side in zip(block.queries[row].tolist(), block.grid, strict=True))
        cells[0].imshow(image)
        cells[0].plot(x * image.width, y * image.height, "o", color="lime", markeredgecolor="black")
        for cell, form in zip(cells[1:], forms, strict=True):
            weights = block.maps[form][:, row].mean(dim=0)
            largest = max(weights.abs().max().item(), 1e-30)
            cell.imshow(weights, cmap="RdBu_r", vmin=-largest, vmax=largest)
            cell.set_title(f"{form}\nlargest {largest:.2g}", fontsize=7)
    figure.suptitle(f"{block.name}: mean over heads; red positive, blue negative weights", fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def visualize(args: argparse.Namespace) -> None:
    from PIL import Image

    from analysis.pages import names_of, trace, write_page
    from jobs.inspection import InspectedImages, open_model
    from jobs.prediction import find_images

    opts = [*args.opts, *(["DATA.IMG_SIZE", f"[{args.size}, {args.size}]"] if args.size else [])]
    model, checkpoint, cfg = open_model(args.resume, args.cfg, opts, weights=args.weights)
    names = names_of(model, args.blocks)
    images = InspectedImages(find_images(args.images), cfg)
    args.output.mkdir(parents=True, exist_ok=True)
    for position, path in enumerate(images.paths):
        pixels, image = images.read(position)
        seen = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        blocks = trace(model, image, names)
        title = f"{cfg.MODEL.NAME}, {args.weights} weights of {checkpoint.path.name}, {path.name}"
        page = args.output / f"{path.stem}.html"
        write_page(page, seen, blocks, title)
        for block in blocks:
            draw_maps(seen, block, args.output / f"{path.stem}_{block.name}.png")
        print(f"{page}: {len(blocks)} blocks, {page.stat().st_size / 2**20:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", required=True, metavar="FILE", help="checkpoint, given as to main.py")
    parser.add_argument("--cfg", nargs="+", default=[], metavar="FILE", help="config, if the checkpoint carries none")
    parser.add_argument("--images", nargs="+", type=Path, required=True, metavar="PATH", help="images, or folders of images")
    parser.add_argument("--output", type=Path, default=Path("attention"), help="folder for pages and pictures")
    parser.add_argument("--blocks", nargs="+", metavar="NAME", help="beginnings of module names; all by default")
    parser.add_argument("--size", type=int, default=0, metavar="PIXELS", help="input size; that of the config by default")
    parser.add_argument("--weights", choices=("raw", "ema", "auto"), default="auto")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config keys to override")
    args = parser.parse_args()
    from data.index import DataError
    from weights.reader import CheckpointError

    try:
        visualize(args)
    except (ConfigError, CheckpointError, DataError, ValueError) as error:
        print(f"visualize_attention.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
