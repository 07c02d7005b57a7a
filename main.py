"""Train or evaluate a FLatten Transformer, or measure its throughput.

Several processes: ``torchrun --nproc_per_node=8 main.py --cfg configs/X.yaml ...``. One process: ``python main.py ...``.
"""

import sys

from utils.config.arguments import check_usage, overrides, parse_arguments
from utils.config.loading import load_config
from utils.errors import USAGE_ERROR, is_user_error
from utils.launcher import is_reporting_process, read_launch
from utils.stop import StopRequest
from utils.text import printable


def main(*, ema: bool = False) -> None:
    """Parse and check the command line, then run the requested job.

    Args:
        ema: enable the EMA unless the command line disables it.
    """
    args = parse_arguments(__doc__)
    reporting = True  # an error in the launcher's variables may concern this process only, so every process reports it
    try:
        num_processes = read_launch().size
        reporting = is_reporting_process()
        opts = overrides(args, ema=ema)
        cfg = load_config(args.cfg, opts) if args.cfg else None
        check_usage(args, cfg)
        from jobs.early_checks import check_data, check_tracker  # imports NumPy, which takes longer than the checks above

        check_tracker(args, cfg)
        check_data(args, cfg, opts, num_processes)
    except ValueError as error:
        if not is_user_error(error):
            raise
        if reporting:
            print(f"main.py: error: {printable(error)}", file=sys.stderr)
        sys.exit(USAGE_ERROR)

    stop = StopRequest()
    # Imported late: torch and timm take seconds to import, and usage errors do not need them.
    from jobs.launch import launch

    launch(args, cfg, opts, stop)


if __name__ == "__main__":
    main()
