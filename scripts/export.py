"""Export a trained model as safetensors with timm's config.json, as a torch.export program (.pt2), or as ONNX.

A model card (README.md) is also written to the directory. If safetensors is among the exported formats, timm can load the
directory: ``import flatten_transformer, timm; timm.create_model("local-dir:FOLDER", pretrained=True)``. The .pt2 and ONNX files
are loaded back and compared with the model; the exit status is 1 if their error exceeds the tolerance. ONNX needs three more
packages: pip install onnx onnxscript onnxruntime.

--push-to-hub USER/NAME uploads the directory to the Hugging Face hub; log in first: hf auth login. If the upload fails, the
directory stays, and the exit status is 1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from jobs.early_checks import FORMATS, check_export
from jobs.hub import Publication, UploadError, check_hub, push
from scripts.command_line import check_inputs, create_parser, reporting_errors
from utils.config.arguments import check_weights
from utils.errors import FAILED, ConfigError
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
    parser.add_argument(
        "--push-to-hub", metavar="USER/NAME", default="", help="also upload the directory to the Hugging Face hub"
    )
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: create a private repository")
    parser.add_argument("--license", metavar="ID", default="", help="the hub's identifier of the licence, for the model card")
    parser.add_argument(
        "--datasets", metavar="ID", nargs="+", default=[], help="the hub's identifiers of the training data, for the model card"
    )
    args = parser.parse_args()
    repository = args.push_to_hub
    with reporting_errors(parser):
        if args.private and not repository:
            raise ConfigError("--private applies only to uploads; add --push-to-hub USER/NAME")
        check_weights("", args.checkpoint)
        check_inputs(args)
        if args.eval_json and not args.eval_json.is_file():
            raise ConfigError(f"--eval-json {args.eval_json}: no such file")
        check_export(args.folder, args.formats)
        if repository:
            check_hub(repository)
        from jobs.export import ExportError, export  # imports torch, which takes longer than the checks above

        try:
            files = export(
                args.checkpoint,
                args.folder,
                cfg=args.cfg,
                opts=args.opts,
                weights=args.weights,
                formats=args.formats,
                eval_json=args.eval_json,
                publication=Publication(repository, args.license, tuple(args.datasets)),
            )
        except ExportError as error:
            parser.exit(FAILED, f"{parser.prog}: error: {printable(error)}\n")
    for name, text in files.items():
        print(f"{printable(args.folder / name)}: {text}")
    print(f"{printable(args.folder / 'README.md')}: model card")
    if repository:
        try:
            print(f"uploaded to {printable(push(args.folder, repository, private=args.private))}")
        except UploadError as error:
            parser.exit(FAILED, f"{parser.prog}: error: {printable(error)}\n")


if __name__ == "__main__":
    main()
