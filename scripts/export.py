"""Export a trained model as safetensors with timm's config.json, as a torch.export program (.pt2), or as ONNX.

A model card (README.md) is also written to the directory. If safetensors is among the exported formats, timm can load the
directory: ``import flatten_transformer, timm; timm.create_model("local-dir:FOLDER", pretrained=True)``. The .pt2 and ONNX files
are loaded back and compared with the model; the exit status is 1 if their error exceeds the tolerance. ONNX needs three more
packages: pip install onnx onnxscript onnxruntime.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from jobs.export import FORMATS, ExportError, export
from scripts.command_line import create_parser, reporting_errors
from utils.errors import FAILED
from utils.text import printable


def main() -> None:
    parser = create_parser(__doc__, "--cfg", "--opts", "--weights")
    parser.add_argument("checkpoint", help="file, run directory, URL, or released model")
    parser.add_argument("folder", type=Path, help="output directory; must be empty or new")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["safetensors"])
    parser.add_argument(
        "--eval-json",
        type=Path,
        metavar="FILE",
        help="eval.json with the accuracy for the model card (default: the one next to the checkpoint)",
    )
    args = parser.parse_args()
    with reporting_errors(parser):
        try:
            files = export(**vars(args))
        except ExportError as error:
            parser.exit(FAILED, f"{parser.prog}: error: {printable(error)}\n")
    for name, text in files.items():
        print(f"{printable(args.folder / name)}: {text}")
    print(f"{printable(args.folder / 'README.md')}: model card")


if __name__ == "__main__":
    main()
