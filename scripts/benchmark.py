"""How much of a training step the data cost: the step with its loader over the step on one batch again and again.

Both are timed in turn in one process, so that the ratio holds on a machine whose speed drifts; 1.00 means that the loader
keeps up.
"""

import statistics
import sys
import time
from pathlib import Path

from yacs.config import CfgNode

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils.arguments import overrides, parse_arguments
from utils.config import ConfigError, load_config

FLAGS = ("--cfg", "--data-path", "--opts", "--amp", "--batch-size", "--zip", "--cache-mode")
ROUNDS, UPDATES = 5, 10  # an odd number of rounds, of so many updates with either source


def main() -> None:
    args = parse_arguments(__doc__, FLAGS)
    if not args.cfg:
        sys.exit("benchmark.py: error: --cfg is missing: name a config, such as configs/flatten_swin_t.yaml")
    try:
        cfg = load_config(args.cfg, overrides(args))
    except ConfigError as error:
        sys.exit(f"benchmark.py: error: {error}")
    measure(cfg)


def measure(cfg: CfgNode) -> None:
    import torch  # after the arguments are checked

    from data.build import build_datasets, build_mixup, build_train_loader
    from models import build_model
    from utils.distributed import setup, wrap
    from utils.engine import NUM_REQUESTS, train_step
    from utils.optim import amp_dtype, build_criterion, build_optimizer, build_scaler

    world = setup()
    loader = build_train_loader(cfg, build_datasets(cfg, training=True).train, rank=0, world_size=1, device=world.device)
    mixup = build_mixup(cfg)
    model = build_model(cfg).to(world.device)
    optimizer, scaler = build_optimizer(cfg, model), build_scaler(cfg, world.device)
    criterion, wrapped = build_criterion(cfg, mixed=mixup is not None), wrap(model, world, num_values=1 + NUM_REQUESTS)

    def epochs():
        for epoch in range(10**6):
            loader.set_position(epoch)
            yield from loader

    def time_updates(batches) -> float:
        synchronise()
        started = time.perf_counter()
        for step in range(UPDATES):
            batch = next(batches)
            images, targets = batch.images, batch.targets
            if mixup is not None:
                images, targets = mixup(images.clone(), targets, step)
            options = {"num_batches": 1, "amp_dtype": amp_dtype(cfg), "max_grad_norm": cfg.TRAIN.CLIP_GRAD or float("inf")}
            train_step(wrapped, criterion, optimizer, scaler, [(images, targets)], **options)
        synchronise()
        return (time.perf_counter() - started) / UPDATES

    def synchronise() -> None:
        if world.device.type == "cuda":
            torch.cuda.synchronize()

    def same(batch):
        while True:
            yield batch

    fresh = epochs()
    repeated = same(next(fresh))
    time_updates(fresh)  # warm up
    pairs = [(time_updates(fresh), time_updates(repeated)) for _ in range(ROUNDS)]
    ratios = [with_loader / without for with_loader, without in pairs]
    print(
        f"{cfg.MODEL.NAME} on {world.device.type}, torch {torch.__version__}, batch {cfg.DATA.BATCH_SIZE}, "
        f"{cfg.DATA.NUM_WORKERS} workers: step with loader / without {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f} in {ROUNDS} pairs of {UPDATES} updates)"
    )


if __name__ == "__main__":
    main()
