"""Config keys of the model (MODEL), with their defaults, meanings and legal values."""

from utils.config.key import MAX_SIDE, Key

# Largest sizes of a model. Larger values are mistakes, which would exhaust the memory at the start of a run.
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

MODEL_KEYS = {
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
}
