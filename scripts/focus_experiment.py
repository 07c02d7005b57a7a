"""Compare the sharpness of softmax, linear and focused linear attention in an experiment of the paper's authors.

The experiment has one query and five keys; each is a vector of four positive integers. Attention is sharper if the entropy of
its weights is lower. The script prints the attention weights for the original vectors and for the vectors times 0.2. --plot
draws the entropy against the scale factor of the vectors and against the focusing factor.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from torch import Tensor

from analysis.maps import compare
from analysis.measures import entropy
from scripts.command_line import check_outputs, create_parser, reporting_errors, save_figure

SCALES = (1.0, 0.2)
FORMS = ("softmax", "softmax, scaled", "linear", "focused")
NUM_KEYS, DIM = 49, 32  # 49 tokens per 7 x 7 window and 32 channels per head, as in Swin-T


def make_vectors() -> tuple[Tensor, Tensor]:
    """Query (1, 4) and keys (5, 4) of the authors' experiment."""
    generator = torch.Generator().manual_seed(5)
    keys = torch.randint(1, 9, (4, 5), generator=generator).T
    return torch.tensor([[1.0, 2.0, 4.0, 9.0]]).double(), keys.double()


def attention_weights(form: str, q: Tensor, k: Tensor, *, power: float = 3) -> Tensor:
    """Attention weights (N, M) for q (N, D) and k (M, D).

    Args:
        form: one of ``FORMS``. ``softmax, scaled`` divides the similarities by the square root of D; ``softmax`` does not.
    """
    if form == "softmax":
        return compare("softmax", q * q.shape[-1] ** 0.5, k)
    return compare(form.removesuffix(", scaled"), q, k, power=power)


def table() -> str:
    q, k = make_vectors()
    lines = []
    for scale in SCALES:
        lines.append(f"q and k times {scale:g}")
        for form in FORMS:
            weights = attention_weights(form, scale * q, scale * k)
            values = ", ".join(f"{weight:.4f}" for weight in weights[0])
            lines.append(f"  {form:<16} [{values}]  entropy / log 5: {entropy(weights).item():.3f}")
    return "\n".join(lines)


def random_vectors() -> tuple[Tensor, Tensor]:
    """64 queries (64, 32) and 49 keys (49, 32) from a normal distribution."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(64, DIM, generator=generator), torch.randn(NUM_KEYS, DIM, generator=generator)
    return q.double(), k.double()


def mean_entropy(form: str, q: Tensor, k: Tensor, *, power: float = 3) -> float:
    return entropy(attention_weights(form, q, k, power=power)).mean().item()


def crossing(q: Tensor, k: Tensor, form: str) -> float | None:
    """Factor by which q and k must be multiplied to make softmax as sharp as focused attention.

    Returns None if no factor between 0.01 and 10 does this.

    Args:
        form: ``softmax`` or ``softmax, scaled``.
    """
    target = mean_entropy("focused", q, k)
    low, high = 0.01, 10.0
    if not mean_entropy(form, low * q, low * k) > target > mean_entropy(form, high * q, high * k):
        return None
    for _ in range(50):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if mean_entropy(form, middle * q, middle * k) > target else (low, middle)
    return low


def draw(path: Path) -> None:
    from matplotlib.figure import Figure

    scales, powers = torch.logspace(-2, 1, 61).tolist(), torch.linspace(1, 32, 63).tolist()
    cases = {"the experiment": make_vectors(), f"Gaussian q and k, {DIM} channels, {NUM_KEYS} keys": random_vectors()}
    figure = Figure(figsize=(10, 7), layout="constrained", dpi=110)
    axes = figure.subplots(2, 2, sharey="row")
    styles = dict(zip(FORMS, ("C0-", "C0--", "C2-", "C3-"), strict=True))
    for (title, (q, k)), (left, right) in zip(cases.items(), axes, strict=True):
        for form, style in styles.items():
            left.semilogx(scales, [mean_entropy(form, s * q, s * k) for s in scales], style, label=form)
        right.plot(powers, [mean_entropy("focused", q, k, power=p) for p in powers], "C3-", label="focused")
        for form in FORMS[:3]:
            right.axhline(
                mean_entropy(form, q, k), color=styles[form][:2], linestyle=styles[form][2:], label=f"{form}, scale factor 1"
            )
        right.axvline(3, color="grey", linewidth=0.5)
        left.set(title=title, xlabel="scale factor of q and k", ylabel="entropy / log of the number of keys")
        right.set(title=f"{title}, scale factor 1", xlabel="focusing factor p (the paper: 3)")
        for axis in (left, right):
            axis.set_ylim(0, 1.02)
            axis.legend(fontsize=8)
    save_figure(figure, path)


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="plot entropy against scale factor and focusing factor")
    args = parser.parse_args()
    with reporting_errors(parser):
        check_outputs(args, "plot")
    print(table())
    for title, (q, k) in {"the experiment": make_vectors(), "Gaussian q and k": random_vectors()}.items():
        for form in FORMS[:2]:
            if (factor := crossing(q, k, form)) is not None:
                text = f"{form} is as sharp as focused attention if q and k are multiplied by {factor:.3f}"
                print(f"{title}: {text}, and sharper if the factor is larger")
    if args.plot is not None:
        draw(args.plot)
        print(f"plot: {args.plot}")


if __name__ == "__main__":
    main()
