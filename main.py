"""Train, evaluate or measure a FLatten Transformer: ``torchrun --nproc_per_node=8 main.py --cfg configs/X.yaml ...``

Without torchrun, it runs as one process.
"""

import sys
from pathlib import Path

from utils.arguments import check_usage, is_reporting_process, overrides, parse_arguments
from utils.config import ConfigError, load_config
from utils.stop import StopRequest

CONFIGS = Path(__file__).parent / "configs"
USAGE_ERROR = 2  # exit status


def main(*, ema: bool = False) -> None:
    """Parse and check the command line, then run the requested job.

    Args:
        ema: enable the EMA unless the command line disables it.
    """
    args = parse_arguments(__doc__)
    try:
        pairs = overrides(args, ema=ema)
        cfg = load_config(args.cfg, pairs) if args.cfg else None
        check_usage(args, cfg, CONFIGS)
    except ConfigError as error:
        if is_reporting_process():
            print(f"main.py: error: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)

    stop = StopRequest()
    # Imported late: torch and timm take seconds to import, and usage errors do not need them.
    from jobs.launch import launch

    launch(args, cfg, pairs, stop)


if __name__ == "__main__":
    main()
