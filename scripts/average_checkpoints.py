"""Average the weights of several checkpoints into one file, as in model soups (https://arxiv.org/abs/2203.05482).

The file contains the averaged weights, and the config and class names of the first checkpoint. Evaluate it with
main.py --eval --resume, or fine-tune from it with main.py --pretrained.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.command_line import check_inputs, create_parser, reporting_errors
from utils.errors import ConfigError


def main() -> None:
    parser = create_parser(__doc__, "checkpoints", "--weights")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    with reporting_errors(parser):
        if args.output.exists():
            raise ConfigError(f"{args.output} already exists; choose another name")
        if len(args.checkpoints) < 2:
            raise ConfigError(f"{args.checkpoints[0]}: only one checkpoint; give two or more to average")
        check_inputs(args)
        from engine.checkpoint_writer import save_checkpoint
        from jobs.averaging import average
        from jobs.locate_checkpoint import locate
        from models.checkpoints.reader import sha256
        from utils.log import setup_logging

        setup_logging(rank=0)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(average([locate(reference) for reference in args.checkpoints], args.weights), args.output)
        digest = sha256(args.output)
    print(f"{args.output}: mean of {len(args.checkpoints)} checkpoints, sha256 {digest}")


if __name__ == "__main__":
    main()
