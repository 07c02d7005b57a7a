"""Every config key: default, meaning, and legal values. ``docs/configuration.md`` is generated from ``KEYS``."""

from utils.config.key import MAX_SIDE, Key
from utils.config.model_keys import MODEL_KEYS
from utils.config.training_keys import TRAINING_KEYS

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
BEST_METRICS = ("acc1", "balanced_accuracy", "macro_f1", "loss")
CLASS_MAPS = ("names", "imagenet")  # values of TEST.CLASS_MAP that are not files

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
    **MODEL_KEYS,
    **TRAINING_KEYS,  # TRAIN, AUG and EMA
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
    "EVAL_FREQ",
    "BEST_METRIC",
)
