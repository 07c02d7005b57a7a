"""Write scikit-learn's handwritten digits as image files: 1,797 real images of 10 classes, without a download.

Every fifth image goes to ``val``, the rest to ``train``.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.command_line import check_positive, create_parser, reporting_errors


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("folder", type=Path, help="output directory; the images are written to train/<digit>/ and val/<digit>/")
    parser.add_argument("--size", type=int, default=64, help="side length in pixels (8 in the original images)")
    args = parser.parse_args()
    with reporting_errors(parser):
        check_positive(args, "size")
        num_images = write_digits(args.folder, args.size)
    print(f"{num_images} images in {args.folder}")


def write_digits(folder: Path, size: int) -> int:
    """Write all images below a directory. Returns their number."""
    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        class_folder = folder / ("val" if index % 5 == 0 else "train") / str(label)
        class_folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 255 / 16).round().astype(np.uint8))  # scikit-learn's grey levels are 0 to 16
        image.resize((size, size), Image.Resampling.BICUBIC).save(class_folder / f"{index:04d}.png")
    return len(digits.target)


if __name__ == "__main__":
    main()
