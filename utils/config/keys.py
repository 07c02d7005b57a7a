"""Every config key: default, meaning, and legal values. ``docs/configuration.md`` is generated from this table."""

from dataclasses import dataclass

from utils.config.optimizers import OPTIMIZERS

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
INFINITY = float("inf")
# Largest sizes of a model and its inputs. Larger values are mistakes, which would exhaust the memory at the start of a run.
MAX_SIDE = 8192  # pixels
MAX_CLASSES = 1_000_000
MAX_CHANNELS = 65_536
MAX_BLOCKS = 1000  # per stage

MODEL_TYPES = (
    "flatten_swin",
    *(f"flatten_pvt_{size}" for size in ("tiny", "small", "medium", "large")),
    *(f"flatten_pvt_v2_b{size}" for size in range(6)),
    "FLatten_CSWin_64_24181_tiny_224",
    "FLatten_CSWin_64_24322_small_224",
    "FLatten_CSWin_96_36292_base_224",
    "FLatten_CSWin_96_36292_base_384",
    "flatten_deit",
    *(f"flatten_deit_{size}" for size in "tsb"),
)
BEST_METRICS = ("acc1", "balanced_accuracy", "macro_f1", "loss")
TIMM_PREFIX = "timm:"  # prefix of a TRAIN.TEACHER that is a model of timm
CLASS_MAPS = ("names", "imagenet")  # values of TEST.CLASS_MAP that are not files


@dataclass(frozen=True)
class Key:
    """A config key.

    Args:
        default: default value, which also determines the type of the key.
        meaning: what the key does, and its unit, for the documentation.
        choices: legal values; () for no restriction.
        minimum, maximum: smallest and largest legal number, also of each number in a list. Without a minimum, the value is not
            restricted, except that numbers are finite.
        is_path: the value is a path, in which ~ is expanded.
    """

    default: object
    meaning: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float = INFINITY
    is_path: bool = False

    def legal_numbers(self, *, several: bool) -> str:
        """The range of a key with a minimum, in words, such as "a number from 0 to 1"."""
        limits = f"from {self.minimum:g} to {self.maximum:.10g}" if self.maximum < INFINITY else f"of at least {self.minimum:g}"
        return f"{'numbers, each' if several else 'a number'} {limits}"


KEYS = {
    "BASE": Key(
        [""],
        "config files to inherit from, with paths relative to this file; later files override earlier ones, and this file "
        "overrides all of them",
    ),
    # Data
    "DATA.DATA_PATH": Key(
        "", "directory with `train/` and `val/`, or with zip archives, tar or parquet shards of these splits", is_path=True
    ),
    "DATA.TRAIN_SPLIT": Key(
        "",
        "training images below `DATA.DATA_PATH`: a directory (`.` for `DATA.DATA_PATH` itself), a name such as `train`, an "
        "archive, or a pattern of archives such as `imagenet1k-train-*.tar`; empty: `train`",
        is_path=True,
    ),
    "DATA.VAL_SPLIT": Key(
        "",
        "validation images, given like `DATA.TRAIN_SPLIT`; empty: the first of `val`, `valid`, `validation` and `test` that "
        "exists",
        is_path=True,
    ),
    "DATA.VAL_FRACTION": Key(
        0.0,
        "fraction of the training images of each class that is held out and used as validation images; the choice depends "
        "only on the names of the files; cannot change on resume; 0: use the validation split",
        minimum=0,
        maximum=0.9,
    ),
    "DATA.DATASET": Key(
        "imagenet",
        "has no effect; the paper's configs set it to `imagenet`, which is accepted for every data set",
        choices=("imagenet",),
    ),
    "DATA.ZIP_MODE": Key(False, "read `<split>.zip` and `<split>_map.txt` instead of directories"),
    "DATA.CACHE_MODE": Key(
        "part",
        "images of zip archives that each process keeps in memory: none (`no`), all (`full`) or an equal share (`part`)",
        choices=("no", "full", "part"),
    ),
    "DATA.INDEX_CACHE": Key(
        "~/.cache/flatten",
        "cache directory for the image lists of large splits; empty: no cache, list the images at every start",
        is_path=True,
    ),
    "DATA.UNREADABLE": Key(
        "error",
        "unreadable training images: `error` ends the run, `skip` omits them from their batch, `replace` substitutes other "
        "images; in evaluation, an unreadable image always ends the run",
        choices=("error", "skip", "replace"),
    ),
    "DATA.MAX_UNREADABLE": Key(
        100,
        "maximum number of unreadable images per process before the run ends (`skip` or `replace`); each start counts from 0",
        minimum=0,
    ),
    "DATA.ACCEPT_CHANGES": Key(
        False,
        "resume although images were added, removed or replaced since the checkpoint; classes and the number of updates per "
        "epoch must be unchanged; if validation images changed, the best accuracy is reset; also applies to `--replay`",
    ),
    "DATA.SAMPLING": Key(
        "natural",
        "training images of an epoch: each image once (`natural`), or as many images of each class (`balanced`), which "
        "repeats images of rare classes with other augmentations and omits images of frequent classes",
        choices=("natural", "balanced"),
    ),
    "DATA.BATCH_SIZE": Key(128, "images per process and forward pass", minimum=1, maximum=1_000_000),
    "DATA.GLOBAL_BATCH_SIZE": Key(
        0,
        "images per update, over all processes; gradients are accumulated over enough forward passes to reach this "
        "number; 0: `DATA.BATCH_SIZE` times the number of processes times `TRAIN.ACCUMULATION_STEPS`",
        minimum=0,
    ),
    "DATA.DROP_LAST": Key(
        True,
        "leave out the images of an epoch that do not fill its last update, which are other images in every epoch; False: "
        "complete the last update with the first images of the epoch. Determines the number of updates per epoch",
    ),
    "DATA.IMG_SIZE": Key(
        224, "input size in pixels: one number for a square, or `[height, width]`", minimum=1, maximum=MAX_SIDE
    ),
    "DATA.INTERPOLATION": Key(
        "bicubic",
        "interpolation for resizing; `random` chooses bicubic or bilinear for each training image, but means bilinear in "
        "evaluation and for input sizes up to 32 pixels",
        choices=("bicubic", "bilinear", "random"),
    ),
    "DATA.MEAN": Key(IMAGENET_MEAN, "mean of each channel, for normalisation of pixel values in [0, 1]"),
    "DATA.STD": Key(IMAGENET_STD, "standard deviation of each channel, for normalisation of pixel values in [0, 1]; above 0"),
    "DATA.EXIF": Key(
        False,
        "turn photographs upright by their EXIF orientation, in training, evaluation and prediction; without it, they are read "
        "as they are stored, as for the published accuracies. TIFF and HEIC files are always turned",
    ),
    "DATA.NUM_WORKERS": Key(
        -1,
        "loader workers per training process, at most its CPU cores; -1: its cores minus one, from 1 to 16. Processes share "
        "the cores that they have in common. Results do not depend on this number",
        minimum=-1,
    ),
    "DATA.WORKER_TIMEOUT": Key(
        300.0,
        "maximum seconds in which the loader workers finish no image while the run waits for a batch; a warning "
        "names the images after 30 s; 0: no limit",
        minimum=0,
    ),
    "DATA.PIN_MEMORY": Key(True, "load batches into page-locked memory, for faster copies to a GPU"),
    # Model
    "MODEL.TYPE": Key(
        "flatten_swin", "model family; for PVT, CSwin and most DeiT models, the type includes the size", choices=MODEL_TYPES
    ),
    "MODEL.NAME": Key("flatten_swin_t", "name of the model; also the name of its directory in `OUTPUT`"),
    "MODEL.NUM_CLASSES": Key(
        1000,
        "number of classes of the model; must equal the number of classes of the data, except with `TEST.CLASS_MAP`",
        minimum=2,
        maximum=MAX_CLASSES,
    ),
    "MODEL.DROP_RATE": Key(0.0, "dropout rate of embeddings, attention projections and MLPs", minimum=0, maximum=0.999),
    "MODEL.DROP_PATH_RATE": Key(
        0.1,
        "drop-path rate (stochastic depth) of the last block; the rate increases linearly from 0 over the blocks",
        minimum=0,
        maximum=0.999,
    ),
    "MODEL.LABEL_SMOOTHING": Key(
        0.1, "fraction of the target probability that is spread over all classes", minimum=0, maximum=0.999
    ),
    "MODEL.RESUME": Key(
        "",
        "checkpoint to resume from, or to evaluate: a file, the directory of a run, a URL, or the name of a released model",
        is_path=True,
    ),
    "MODEL.PRETRAINED": Key("", "checkpoint with the initial weights, in any form that `MODEL.RESUME` accepts", is_path=True),
    "MODEL.SWIN.PATCH_SIZE": Key(4, "side of a patch in pixels", minimum=1, maximum=MAX_SIDE),
    "MODEL.SWIN.EMBED_DIM": Key(
        96, "channels of the first stage; each following stage has twice as many", minimum=1, maximum=MAX_CHANNELS
    ),
    "MODEL.SWIN.DEPTHS": Key([2, 2, 6, 2], "number of blocks per stage", minimum=1, maximum=MAX_BLOCKS),
    "MODEL.SWIN.NUM_HEADS": Key(
        [3, 6, 12, 24], "attention heads per stage; must divide the stage's channels", minimum=1, maximum=MAX_CHANNELS
    ),
    "MODEL.SWIN.WINDOW_SIZE": Key(
        7,
        "side of the windows of linear blocks, in tokens; 0: the whole token map, for every `DATA.IMG_SIZE`; a larger "
        "window than the map is limited to it",
        minimum=0,
        maximum=MAX_SIDE,
    ),
    "MODEL.SWIN.SOFTMAX_WINDOW": Key(
        0,
        "side of the windows of softmax blocks, in tokens; limited to the size of the token map; 0: 7, or 12 if "
        "`MODEL.SWIN.WINDOW_SIZE` is above 56",
        minimum=0,
        maximum=MAX_SIDE,
    ),
    "MODEL.SWIN.MLP_RATIO": Key(4.0, "ratio of the MLP's hidden channels to its input channels", minimum=0.01, maximum=1000),
    "MODEL.SWIN.QKV_BIAS": Key(True, "biases in the projections to q, k and v"),
    "MODEL.SWIN.PATCH_NORM": Key(True, "layer norm after the patch embedding"),
    "MODEL.DEIT.PATCH_SIZE": Key(16, "side of a patch in pixels", minimum=1, maximum=MAX_SIDE),
    "MODEL.DEIT.EMBED_DIM": Key(192, "channels of every block", minimum=1, maximum=MAX_CHANNELS),
    "MODEL.DEIT.DEPTH": Key(12, "number of blocks", minimum=1, maximum=MAX_BLOCKS),
    "MODEL.DEIT.NUM_HEADS": Key(
        3, "attention heads per block; must divide `MODEL.DEIT.EMBED_DIM`", minimum=1, maximum=MAX_CHANNELS
    ),
    "MODEL.LA.FOCUSING_FACTOR": Key(3, "power p of the focused function (eq. 6 of the paper)", minimum=1, maximum=1000),
    "MODEL.LA.KERNEL_SIZE": Key(5, "side of the depthwise convolution's kernel; odd", minimum=1, maximum=MAX_SIDE),
    "MODEL.LA.ATTN_TYPE": Key(
        "LLLL",
        "one letter per stage: `L` linear, `S` softmax, `M` mixed (linear blocks followed by softmax blocks); with `M`, the "
        "number of linear blocks in that stage follows the last letter, as in `LLMS3`",
    ),
    "MODEL.LA.PVT_LA_SR_RATIOS": Key(
        "1111", "PVT: spatial reduction ratio of keys and values in linear blocks, one digit per stage"
    ),
    "MODEL.LA.CSWIN_LA_SPLIT_SIZE": Key(
        "56-28-14-7",
        "CSwin: stripe width of linear blocks in tokens, one number per stage; 0: the whole token map, for every "
        "`DATA.IMG_SIZE`",
    ),
    "MODEL.LA.KIND": Key(
        "focused",
        "attention of the linear blocks: `focused` is the paper's method; the paper compares it with the others",
        choices=("focused", "relu", "efficient", "hydra", "angular", "enhanced", "softmax"),
    ),
    "MODEL.LA.FOCUSING": Key(True, "apply the focused function; no effect unless `MODEL.LA.KIND` is `focused`"),
    "MODEL.LA.RANK_RESTORATION": Key(
        True, "add the depthwise convolution of the values; affects only `MODEL.LA.KIND` `focused` and `enhanced`"
    ),
    "MODEL.LA.BACKEND": Key(
        "auto",
        "implementation of `MODEL.LA.KIND` `focused`: `torch` operations, `triton` kernels (an error if unavailable), or "
        "`auto`: the kernels if GPU and model are supported and the kernels pass a self-check at the start",
        choices=("auto", "triton", "torch"),
    ),
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
    "TRAIN.OPTIMIZER.EPS": Key(1e-8, "epsilon; the default is that of `adamw`, others have their own in timm", minimum=0),
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
    # Evaluation
    "TEST.CROP": Key(True, "crop in evaluation; False has the same effect as `TEST.CROP_MODE none`"),
    "TEST.CROP_MODE": Key(
        "squash",
        "resize to `DATA.IMG_SIZE / TEST.CROP_PCT`, then crop the centre: `squash` resizes both sides and ignores the aspect "
        "ratio, as for the published accuracies; `short` resizes the shorter side and keeps the aspect ratio; `none` resizes "
        "both sides to `DATA.IMG_SIZE` and does not crop",
        choices=("squash", "short", "none"),
    ),
    "TEST.CROP_PCT": Key(
        0.875,
        "ratio of the side of the centre crop to the side of the resized image; treated as 1 for input sizes up to 32 pixels",
        minimum=0.01,
        maximum=1,
    ),
    "TEST.INTERPOLATION": Key(
        "", "interpolation in evaluation; empty: same as `DATA.INTERPOLATION`", choices=("", "bicubic", "bilinear")
    ),
    "TEST.BATCH_SIZE": Key(0, "images per process in evaluation; 0: `DATA.BATCH_SIZE`", minimum=0),
    "TEST.CLASS_MAP": Key(
        "",
        "for `--eval` and `--pretrained`, if the data have other classes than the weights, or another order: `names` matches "
        "classes by name, or numbered directories by class id; `imagenet` is for ImageNet-A, -R, -V2 and -Sketch; otherwise a "
        "file with the class id in the weights for each directory",
        is_path=True,
    ),
    "TEST.RESTRICT_CLASSES": Key(
        True,
        "with `TEST.CLASS_MAP` on data with a part of the model's classes: `True` restricts predictions to the classes of the "
        "data, `False` allows all classes of the model",
    ),
    "TEST.REAL_LABELS": Key(
        "",
        "file `real.json` with ImageNet's ReaL labels; `--eval` then also reports the accuracy on these labels",
        is_path=True,
    ),
    "TEST.PREDICTIONS": Key(False, "`--eval` writes the prediction for every image, for `scripts/compare_evals.py`"),
    "TEST.MISTAKES": Key(
        0,
        "`--eval` draws this many of the wrong predictions with the highest confidence, with their images; 0: none",
        minimum=0,
        maximum=100,
    ),
    "TEST.TTA": Key(
        "none",
        "test-time augmentation of `--eval`, `predict.py` and `evaluate_all.py`: `flip` takes the mean of the logits of an "
        "image and of its horizontal mirror image, at twice the cost; evaluations during training do not use it",
        choices=("none", "flip"),
    ),
    "TEST.PRECISION": Key(
        "fp32", "precision of evaluation: `fp32`, or `train` for the precision of training", choices=("fp32", "train")
    ),
    # The run
    "AMP": Key(False, "mixed precision in training"),
    "AMP_DTYPE": Key("bf16", "data type of mixed precision (`AMP`); fp16 uses a loss scaler", choices=("bf16", "fp16")),
    "OUTPUT": Key("output", "output directory; a run is written to `<OUTPUT>/<MODEL.NAME>/<TAG>`", is_path=True),
    "TAG": Key("default", "name of the run and of its output directory"),
    "DETERMINISTIC": Key(
        "off",
        "`warn` and `error` select deterministic algorithms, with a warning or an error if an operation has none",
        choices=("off", "warn", "error"),
    ),
    "TF32": Key(
        True,
        "compute fp32 matrix products and convolutions on GPUs in TF32 (10 bits of mantissa); on by default, as in torch 1.11, "
        "which the paper's code uses",
    ),
    "CUDNN_BENCHMARK": Key(
        True,
        "time cuDNN's algorithms for every new input shape and use the fastest; no effect unless `DETERMINISTIC` is `off`",
    ),
    "SEED": Key(
        0, "seed of initial weights, image order, augmentation, mixup, dropout and drop path", minimum=0, maximum=2**32 - 1
    ),
    "COLLECTIVE_TIMEOUT": Key(
        600.0, "maximum seconds that a process waits for the other processes before the run fails", minimum=1, maximum=86400
    ),
    "PRINT_FREQ": Key(
        10,
        "updates between points of `metrics.jsonl`, each with a log line; the first update of a process, and every 30 s "
        "without a line, add log lines",
        minimum=1,
    ),
    "TRACKER": Key(
        "none",
        "experiment tracker that receives the metrics in addition to `metrics.jsonl` and TensorBoard; its package must be "
        "installed (`pip install wandb`, `trackio` or `mlflow`)",
        choices=("none", "wandb", "trackio", "mlflow"),
    ),
    "SAVE_FREQ": Key(1, "epochs between checkpoints; the state is also saved before every evaluation", minimum=1),
    "SAVE_STEPS": Key(0, "updates between checkpoints within an epoch; 0: none", minimum=0),
    "SAVE_MINUTES": Key(15.0, "minutes between checkpoints within an epoch; 0: none", minimum=0),
    "EVAL_FREQ": Key(1, "epochs between evaluations", minimum=1),
    "ATTENTION_IMAGE": Key(
        "",
        "path of an image; after each evaluation, the attention maps that the raw (non-EMA) weights give for this image are "
        "written to TensorBoard; empty: none",
        is_path=True,
    ),
    "KEEP_CHECKPOINTS": Key(2, "number of newest checkpoints to keep, besides `best.pth`", minimum=1),
    "BEST_METRIC": Key(
        "acc1",
        "metric of the evaluations that decides which checkpoint is the best one, see `KEEP_BEST` and `TRAIN.PATIENCE`; if it "
        "changes on resume, the best checkpoint is determined anew",
        choices=BEST_METRICS,
    ),
    "KEEP_BEST": Key(
        1,
        "number of best checkpoints to keep: 1 keeps only `best.pth`; with a larger number, they are also kept as "
        "`top_<updates>.pth`",
        minimum=1,
    ),
}

# Keys of linear attention that determine the model. MODEL.LA.BACKEND depends on the machine.
LINEAR_ATTENTION_KEYS = tuple(key for key in KEYS if key.startswith("MODEL.LA.") and key != "MODEL.LA.BACKEND")
# Keys of window sizes. Different values mean the same model if the windows cover the whole token map.
WINDOW_KEYS = ("MODEL.SWIN.WINDOW_SIZE", "MODEL.SWIN.SOFTMAX_WINDOW", "MODEL.LA.CSWIN_LA_SPLIT_SIZE")
# Prefixes of the keys that determine the predictions for an image: model and preprocessing.
PREDICTION_KEY_PREFIXES = (
    "MODEL.TYPE",
    "MODEL.NUM_CLASSES",
    "MODEL.SWIN.",
    "MODEL.DEIT.",
    *LINEAR_ATTENTION_KEYS,
    "DATA.IMG_SIZE",
    "DATA.INTERPOLATION",
    "DATA.MEAN",
    "DATA.STD",
    "DATA.EXIF",
    "TEST.CROP",
    "TEST.INTERPOLATION",
)
# Prefixes of the keys that are read from the config in a weight file. A file may come from anyone, so it determines no path, no
# output directory and no limit. In checkpoints of the reference implementation, training keys have other meanings.
STORED_KEY_PREFIXES = (
    *PREDICTION_KEY_PREFIXES,
    "MODEL.NAME",  # a label; the directory of results has another name, see ``Location.name``
    "MODEL.DROP_RATE",
    "MODEL.DROP_PATH_RATE",
    "DATA.VAL_FRACTION",  # the same images are held out in evaluation as in training
    "AMP",  # with AMP_DTYPE: the precision of TEST.PRECISION train
    "TF32",
)
# Prefixes of the keys that are also read to repeat an update, or to describe the training of an exported model. The path in
# TRAIN.TEACHER is opened only if the command line repeats it.
RECIPE_KEY_PREFIXES = (
    *STORED_KEY_PREFIXES,
    "MODEL.LABEL_SMOOTHING",
    "TRAIN.",
    "AUG.",
    "EMA.",
    "SEED",
    "DETERMINISTIC",
    "CUDNN_BENCHMARK",
    "DATA.BATCH_SIZE",
    "DATA.GLOBAL_BATCH_SIZE",
    "DATA.DROP_LAST",
    "DATA.SAMPLING",
    "DATA.ZIP_MODE",
)
