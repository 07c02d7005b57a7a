"""Compare parameters and multiply-adds of the models with the values in the paper, or plot the cost against resolution.

torch's FLOP counter counts the operations of matrix products and convolutions. Half of this count is the number of
multiply-adds, which papers call FLOPs. Other operations are counted separately: 5 per element for layer norms, 1 per element
for pointwise operations and reductions (activations, the focused function, residual additions). Nothing is computed: models and
images are on the meta device.
"""

import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from models import create_model, list_models
from scripts.command_line import create_parser, save_figure
from utils.text import markdown_table

# Millions of parameters and billions of multiply-adds, as published in the paper. For the sizes that the paper omits (PVT-M and
# -B, PVTv2-B0, -B3 and -B4), the values come from the paper's code.
PAPER = {
    "flatten_deit_t": (6.1, 1.1),
    "flatten_pvt_t": (12.2, 2.0),
    "flatten_pvt_s": (21.7, 4.0),
    "flatten_pvt_m": (37.2, 7.1),
    "flatten_pvt_b": (50.6, 10.4),
    "flatten_pvt_v2_b0": (3.6, 0.6),
    "flatten_pvt_v2_b1": (12.9, 2.2),
    "flatten_pvt_v2_b2": (22.6, 4.3),
    "flatten_pvt_v2_b3": (38.3, 7.3),
    "flatten_pvt_v2_b4": (51.8, 10.7),
    "flatten_swin_t": (29, 4.5),
    "flatten_swin_s": (51, 8.7),
    "flatten_swin_b": (89, 15.4),
    "flatten_swin_b_384": (91, 46.5),
    "flatten_cswin_t": (21, 4.3),
    "flatten_cswin_s": (35, 6.9),
    "flatten_cswin_b": (75, 15.0),
    "flatten_cswin_b_384": (78, 46.4),
}
POINTWISE = {"add", "sub", "mul", "div", "pow", "relu", "gelu", "_softmax", "sum", "mean", "linalg_vector_norm", "amax"}


class PointwiseCounter(TorchDispatchMode):
    """Count the operations that torch's FLOP counter ignores."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__.rstrip("_")
        if name == "native_layer_norm":
            self.count += 5 * args[0].numel()
        elif name in POINTWISE:
            self.count += max(args[0].numel() if isinstance(args[0], torch.Tensor) else 0, result.numel())
        return result


def measure(name: str, size: tuple[int, int] | None = None, **options) -> tuple[int, int, int]:
    """Numbers of parameters, of multiply-adds (matrix products and convolutions) and of other operations, for one image."""
    size = size or ((384, 384) if name.endswith("_384") else (224, 224))
    with torch.device("meta"):
        model = create_model(name, img_size=size, **options).eval()
    counter, pointwise = FlopCounterMode(display=False), PointwiseCounter()
    with torch.no_grad(), counter, pointwise:
        model(torch.empty(1, 3, *size, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2, pointwise.count


def print_table(names: list[str]) -> None:
    rows = []
    for name in names:
        parameters, products, others = measure(name)
        millions, billions = PAPER.get(name, (None, None))
        published = f"{millions}M" if millions else "", f"{billions}G" if billions else ""
        costs = f"{products / 1e9:.2f}", f"{others / 1e9:.2f}"
        rows.append([f"`{name}`", f"{parameters / 1e6:.2f}M", published[0], *costs, published[1]])
    header = ["model", "parameters", "paper: parameters", "multiply-adds, G", "other operations, G", "paper: multiply-adds"]
    print(markdown_table(header, rows))


def activation_bytes(name: str, side: int, **options) -> int:
    """Bytes of activations saved for the backward pass, for one image in fp32."""
    with torch.device("meta"):
        model = create_model(name, img_size=side, **options)
    saved_bytes = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            saved_bytes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.empty(1, 3, side, side, device="meta"))
    del output
    return sum(saved_bytes.values())


def plot(path: Path) -> None:
    """Plot the cost of DeiT-T against resolution, with linear and with softmax attention."""
    from matplotlib.figure import Figure

    sides = [224, 320, 448, 640, 896, 1280]
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    flops_axes, memory_axes = figure.subplots(1, 2)
    for attn_type, label in (("L", "focused linear"), ("S", "softmax, matrix stored")):
        # Softmax attention replaces focused linear attention in the same blocks, and stores its attention matrix.
        options = {"attn_type": "L", "linear": {"kind": "softmax", "rank_restoration": False}} if attn_type == "S" else {}
        flops = [measure("flatten_deit_t", (side, side), **options)[1] / 1e9 for side in sides]
        memory = [activation_bytes("flatten_deit_t", side, **options) / 2**30 for side in sides]
        flops_axes.plot(sides, flops, marker="o", label=label)
        memory_axes.plot(sides, memory, marker="o", label=label)
    flops_axes.set(xlabel="side length in pixels", ylabel="multiply-adds, G", title="FLatten-DeiT-T: cost of one image")
    memory_axes.set(xlabel="side length in pixels", ylabel="GiB, fp32", title="Activations stored for the backward pass")
    for axes in (flops_axes, memory_axes):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sides, [str(side) for side in sides])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
    print(path)


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="models in the table, such as flatten_swin_t; default: all")
    parser.add_argument("--png", type=Path, help="plot cost against resolution to this file instead of printing the table")
    args = parser.parse_args()
    if unknown := set(args.models) - set(list_models()):
        parser.error(f"unknown model {min(unknown)}; choose from {', '.join(list_models())}")
    if args.png and args.models:
        parser.error("--png plots one fixed model; remove the names of models")
    if args.png:
        plot(args.png)
    else:
        print_table(args.models or list_models())


if __name__ == "__main__":
    main()
