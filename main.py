"""Train, evaluate or measure a FLatten Transformer: ``torchrun --nproc_per_node=8 main.py --cfg configs/X.yaml ...``

Without torchrun it runs as one process.
"""

import sys
from pathlib import Path

from utils.arguments import check_usage, overrides, parse_arguments, prints_mistakes
from utils.config import ConfigError, load_config
from utils.stop import StopRequest

CONFIGS = Path(__file__).parent / "configs"
USAGE_ERROR = 2  # exit status


def main(*, ema: bool = False) -> None:
    """Parse and check the command line, then run the job that it asks for.

    Args:
        ema: average the weights unless the command line says otherwise.
    """
    args = parse_arguments(__doc__)
    try:
        pairs = overrides(args, ema=ema)
        cfg = load_config(args.cfg, pairs) if args.cfg else None
        check_usage(args, cfg, CONFIGS)
    except ConfigError as error:
        if prints_mistakes():
            print(f"main.py: error: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)

    stop = StopRequest()
    # torch and timm take seconds to import: mistakes above are reported without them.
    from jobs.launch import launch

    launch(args, cfg, pairs, stop)


if __name__ == "__main__":
    main()
