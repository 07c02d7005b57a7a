"""Warnings at the start of a short run: images that no update uses, too few updates to learn, a patience without effect."""

import logging
import math
import shlex

from yacs.config import CfgNode

from data.splits import suggest_batch_size
from engine.schedule import REFERENCE_BATCH, accumulation_steps, build_schedule, count_epochs, global_batch_size

logger = logging.getLogger(__name__)

MAX_DROPPED = 0.05  # fraction of the images
MIN_UPDATES = 500  # in all epochs; see docs/finetuning.md
MAX_FEW_IMAGES = 1000  # up to this number, configs/recipes/few_images.yaml is proposed
FEW_IMAGES_BATCH = 16  # TRAIN.RECIPE_BATCH_SIZE of this recipe


def warn_about_few_images(cfg: CfgNode, num_images: int, updates_per_epoch: int, world_size: int) -> None:
    """Warn if an epoch leaves out a noticeable part of the images, or if the run has few updates. Each warning has a remedy."""
    global_batch = global_batch_size(cfg, world_size)
    dropped = max(num_images - updates_per_epoch * global_batch, 0)
    if dropped > MAX_DROPPED * num_images:
        logger.warning(
            "every epoch leaves out %d of %d images (%.0f %%), other ones each time, which do not fill an update of %d images; "
            "to use all of them, add --opts DATA.DROP_LAST False",
            dropped,
            num_images,
            100 * dropped / num_images,
            global_batch,
        )
    num_updates = count_epochs(cfg) * updates_per_epoch
    if num_updates >= MIN_UPDATES:
        return
    recipe = ""
    is_other_recipe = not cfg.TRAIN.FREEZE_BACKBONE and cfg.TRAIN.RECIPE_BATCH_SIZE != FEW_IMAGES_BATCH
    if cfg.MODEL.PRETRAINED and is_other_recipe and num_images <= MAX_FEW_IMAGES:
        recipe = ", or list configs/recipes/few_images.yaml after the model's config in --cfg instead of another recipe"
    logger.warning(
        "%d images, global batch size %d: %d updates in all, at a learning rate of up to %.3g; a run of fewer than %d updates "
        "rarely reaches a good accuracy; try %s%s",
        num_images,
        global_batch,
        num_updates,
        build_schedule(cfg, updates_per_epoch=updates_per_epoch, world_size=world_size).base_lr,
        MIN_UPDATES,
        advise_more_updates(cfg, num_images, world_size),
        recipe,
    )


def warn_about_patience(cfg: CfgNode) -> None:
    """Warn if TRAIN.PATIENCE cannot end the run early, since the run has too few evaluations."""
    num_evaluations = math.ceil(count_epochs(cfg) / cfg.EVAL_FREQ)
    patience = cfg.TRAIN.PATIENCE
    if patience > 0 and patience >= num_evaluations - 1:  # the last evaluation ends the run anyway
        logger.warning(
            "TRAIN.PATIENCE=%d counts evaluations and cannot end this run early: it has %d in %d epochs (EVAL_FREQ=%d); lower "
            "TRAIN.PATIENCE or EVAL_FREQ",
            patience,
            num_evaluations,
            count_epochs(cfg),
            cfg.EVAL_FREQ,
        )


def advise_more_updates(cfg: CfgNode, num_images: int, world_size: int) -> str:
    """Options for ``MIN_UPDATES`` updates, with smaller batches if possible, at the learning rate of the recipe.

    The learning rate is not lowered with the batch size: the linear rule would make it too low to learn from few updates.
    """
    batch_size = min(suggest_batch_size(num_images, world_size), cfg.DATA.BATCH_SIZE)
    global_batch = batch_size * world_size
    epochs = math.ceil(MIN_UPDATES / (num_images // global_batch))
    learning_rate = cfg.TRAIN.BASE_LR * cfg.TRAIN.RECIPE_BATCH_SIZE / REFERENCE_BATCH
    options = {
        "TRAIN.EPOCHS": max(epochs, cfg.TRAIN.EPOCHS),
        "TRAIN.BASE_LR": f"{learning_rate * REFERENCE_BATCH / global_batch:.3g}",
    }
    if cfg.DATA.GLOBAL_BATCH_SIZE:
        options["DATA.GLOBAL_BATCH_SIZE"] = global_batch
    elif accumulation_steps(cfg, world_size) > 1:
        options["TRAIN.ACCUMULATION_STEPS"] = 1
    opts = " ".join(f"{key} {value}" for key, value in options.items())
    return f"--tag {shlex.quote(f'{cfg.TAG}_more_updates')} --batch-size {batch_size} --opts {opts}"
