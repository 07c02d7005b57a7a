"""Config keys of training (TRAIN, AUG and EMA), with their defaults, meanings and legal values."""

from utils.config.key import Key
from utils.config.optimizers import OPTIMIZERS

TIMM_PREFIX = "timm:"  # prefix of a TRAIN.TEACHER that is a model of timm

TRAINING_KEYS = {
    # Training
    "TRAIN.EPOCHS": Key(300, "number of epochs, excluding the cooldown", minimum=1, maximum=1_000_000),
    "TRAIN.WARMUP_EPOCHS": Key(20, "epochs of linear warm-up from `TRAIN.WARMUP_LR`, included in `TRAIN.EPOCHS`", minimum=0),
    "TRAIN.COOLDOWN_EPOCHS": Key(
        0, "additional epochs at the final learning rate; the `step` schedule continues to decay", minimum=0
    ),
    "TRAIN.BASE_LR": Key(
        5e-4, "peak learning rate at a global batch of 512 images; scaled linearly with the global batch size", minimum=0
    ),
    "TRAIN.WARMUP_LR": Key(5e-7, "learning rate of the first update; scaled like `TRAIN.BASE_LR`", minimum=0),
    "TRAIN.MIN_LR": Key(5e-6, "learning rate at the end of the cosine schedule; scaled like `TRAIN.BASE_LR`", minimum=0),
    "TRAIN.RECIPE_BATCH_SIZE": Key(
        0,
        "global batch size of the recipe; a run with a different one logs a warning; 0: 8 times `DATA.BATCH_SIZE` as "
        "set in the config files, before command-line overrides",
        minimum=0,
    ),
    "TRAIN.WEIGHT_DECAY": Key(
        0.05,
        "weight decay; not applied to norms, biases, relative-position bias tables, and DeiT's class token and position "
        "embedding",
        minimum=0,
    ),
    "TRAIN.LAYER_DECAY": Key(
        1.0,
        "layer-wise learning-rate decay: ratio of a layer's learning rate to that of the next layer towards the head; 1: off",
        minimum=1e-6,
        maximum=1,
    ),
    "TRAIN.HEAD_LR_SCALE": Key(1.0, "learning-rate multiplier of the classification head", minimum=0),
    "TRAIN.FREEZE_BACKBONE": Key(False, "train only the head (linear probe); the frozen layers are in evaluation mode"),
    "TRAIN.CLIP_GRAD": Key(5.0, "maximum L2 norm of the gradient over all parameters; 0 or None: no clipping", minimum=0),
    "TRAIN.ACCUMULATION_STEPS": Key(
        0, "forward passes per update; 0: as many as `DATA.GLOBAL_BATCH_SIZE` needs, or 1 without it", minimum=0
    ),
    "TRAIN.USE_CHECKPOINT": Key(False, "recompute activations in the backward pass to save memory"),
    "TRAIN.COMPILE": Key(False, "compile the model with `torch.compile`"),
    "TRAIN.SIZE_SCHEDULE": Key(
        [],
        "input sizes of training: `[[0, 128], [100, 176], [200, 224]]` trains at 128 pixels, after 100 epochs at 176, and "
        "after 200 epochs at 224; `[epochs, height, width]` if a size is not square. Evaluation is always at `DATA.IMG_SIZE`, "
        "which the last size usually equals; empty: train at `DATA.IMG_SIZE`",
    ),
    "TRAIN.PATIENCE": Key(
        0,
        "end the run after this many evaluations in a row without a better value of `BEST_METRIC` than before, of raw or EMA "
        "weights; 0: train for all epochs",
        minimum=0,
    ),
    "TRAIN.AUTO_RESUME": Key(True, "resume from the newest intact checkpoint of the output directory"),
    "TRAIN.LR_SCHEDULER.NAME": Key(
        "cosine",
        "learning-rate schedule: `cosine` or `poly` to `TRAIN.MIN_LR`, `linear` to 1 % of `TRAIN.BASE_LR`, `step`, `multistep` "
        "or `constant`",
        choices=("cosine", "linear", "step", "multistep", "poly", "constant"),
    ),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": Key(30, "`step`: epochs between two decays", minimum=1),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": Key(
        0.1, "`step` and `multistep`: factor by which each decay multiplies the learning rate", minimum=1e-9, maximum=1
    ),
    "TRAIN.LR_SCHEDULER.MILESTONES": Key([30, 60, 90], "`multistep`: increasing epochs after which the rate decays", minimum=1),
    "TRAIN.LR_SCHEDULER.POWER": Key(1.0, "`poly`: power of the remaining fraction of the updates", minimum=0.01, maximum=100),
    "TRAIN.OPTIMIZER.NAME": Key(
        "adamw",
        "optimizer of timm; `sgd` uses Nesterov momentum, `momentum` classical momentum; cannot change on resume",
        choices=tuple(OPTIMIZERS),
    ),
    # With an epsilon of 0, a parameter with the gradient 0 becomes NaN.
    "TRAIN.OPTIMIZER.EPS": Key(1e-8, "epsilon; the default is that of `adamw`, others have their own in timm", minimum=1e-30),
    "TRAIN.OPTIMIZER.BETAS": Key(
        [0.9, 0.999],
        "betas, in [0, 1): two numbers, or three for `adan`; the default is that of `adamw`, others have their own in timm",
    ),
    "TRAIN.OPTIMIZER.MOMENTUM": Key(0.9, "momentum of `sgd`, `momentum`, `lars`, `muon` and `rmsproptf`", minimum=0, maximum=1),
    "TRAIN.LOSS": Key(
        "ce",
        "training loss: cross entropy (`ce`), or binary cross entropy of each class (`bce`, of timm), averaged over images and "
        "classes; the evaluation loss is always cross entropy, without weights and smoothing",
        choices=("ce", "bce"),
    ),
    "TRAIN.BCE_THRESHOLD": Key(
        0.0, "`bce`: targets above this value become 1, others 0, after mixup and smoothing; 0: off", minimum=0, maximum=0.999
    ),
    "TRAIN.CLASS_WEIGHTS": Key(
        "none",
        "weight of each class in the training loss: `none`, `balanced` (images / (classes * images of the class)), or a list "
        "with a number from 1e-9 to 1e9 per class, by class id",
    ),
    "TRAIN.TEACHER": Key(
        "",
        "trained model from whose predictions the model also learns: a checkpoint, in any form that `MODEL.RESUME` accepts, or "
        "`timm:` and the name of a model of timm; needs the classes of the data; empty: none",
        is_path=True,
    ),
    "TRAIN.DISTILLATION.KIND": Key(
        "hard",
        "what the model learns from the teacher: the predicted class (`hard`: cross entropy), or the probabilities (`soft`: "
        "Kullback-Leibler divergence)",
        choices=("hard", "soft"),
    ),
    "TRAIN.DISTILLATION.WEIGHT": Key(
        0.5, "weight of the distillation loss; that of `TRAIN.LOSS` is 1 minus this weight", minimum=1e-6, maximum=1
    ),
    "TRAIN.DISTILLATION.TEMPERATURE": Key(
        3.0,
        "`soft`: number by which the logits of model and teacher are divided; the loss is multiplied by its square",
        minimum=0.01,
        maximum=1000,
    ),
    # Augmentation
    "AUG.COLOR_JITTER": Key(
        0.4, "strength of colour jitter; no effect unless `AUG.AUTO_AUGMENT` is `none`, as in timm", minimum=0
    ),
    "AUG.AUTO_AUGMENT": Key("rand-m9-mstd0.5-inc1", "AutoAugment, RandAugment or AugMix policy of timm, or `none`"),
    "AUG.DEVICE_RANDAUGMENT": Key(
        False,
        "apply `AUG.AUTO_AUGMENT` to whole batches on the device instead of in the loader workers; RandAugment without `-t` "
        "only; operations and magnitudes have the same distribution, but pixels differ slightly",
    ),
    "AUG.SCALE": Key(
        [0.08, 1.0],
        "minimum and maximum area of a random crop, as a fraction of the image; without effect for input sizes up to 32 "
        "pixels, where images are resized, padded by 4 pixels and cropped",
    ),
    "AUG.RATIO": Key(
        [3 / 4, 4 / 3],
        "minimum and maximum aspect ratio (width / height) of a random crop; without effect for input sizes up to 32 pixels",
    ),
    "AUG.HFLIP": Key(0.5, "probability of a horizontal flip", minimum=0, maximum=1),
    "AUG.REPROB": Key(0.25, "probability of random erasing per image", minimum=0, maximum=1),
    "AUG.REMODE": Key(
        "pixel",
        "fill of random erasing: noise per pixel (`pixel`), one random colour (`rand`) or zeros (`const`)",
        choices=("pixel", "rand", "const"),
    ),
    "AUG.RECOUNT": Key(1, "random erasing: maximum number of rectangles per image", minimum=1, maximum=1000),
    "AUG.REPEATS": Key(
        1,
        "repeated augmentation: number of differently augmented copies of an image per epoch; the number of updates per epoch "
        "does not change, so an epoch uses fewer images",
        minimum=1,
    ),
    "AUG.MIXUP": Key(0.8, "alpha of mixup; 0: off", minimum=0),
    "AUG.CUTMIX": Key(1.0, "alpha of CutMix; 0: off", minimum=0),
    "AUG.CUTMIX_MINMAX": Key(
        None,
        "`[minimum, maximum]` side of the CutMix rectangle as a fraction of the image side; overrides `AUG.CUTMIX`; None: off",
    ),
    "AUG.MIXUP_PROB": Key(
        1.0, "probability that a batch (or pair or image, see `AUG.MIXUP_MODE`) is mixed", minimum=0, maximum=1
    ),
    "AUG.MIXUP_SWITCH_PROB": Key(0.5, "probability of CutMix instead of mixup if both are on", minimum=0, maximum=1),
    "AUG.MIXUP_MODE": Key(
        "batch",
        "one mixing ratio per batch, per pair of images or per image (`elem`); `pair` and `elem` are slow on a GPU",
        choices=("batch", "pair", "elem"),
    ),
    "AUG.MIXUP_OFF_EPOCH": Key(
        0, "train without mixup and CutMix after this many epochs; label smoothing remains; 0: never", minimum=0
    ),
    # Exponential moving average of the weights
    "EMA.ENABLED": Key(False, "maintain an exponential moving average of the weights, and evaluate it as well"),
    "EMA.DECAY": Key(0.9999, "decay of the average per update", minimum=0, maximum=1),
    "EMA.WARMUP": Key(
        False,
        "start with a small decay, which grows to `EMA.DECAY`, so that the average of a short run is not near the initial "
        "weights: after n updates of the average, the decay of the next one is at most `1 - (1 + n) ** (-2/3)`, as in timm",
    ),
    "EMA.FORCE_CPU": Key(False, "keep the EMA weights in host memory"),
}
