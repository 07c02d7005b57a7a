"""Published weights of the FLatten Transformers.

Source: README of the authors' repository, https://github.com/LeapLabTHU/FLatten-Transformer. Each file is a checkpoint
of the paper's code, written by ``torch.save``. Accuracies are on the 50,000 validation images of ImageNet-1K.
"""

from dataclasses import dataclass

_SERVER = "https://cloud.tsinghua.edu.cn/f"


@dataclass(frozen=True)
class Released:
    """A published weight file.

    Args:
        name: model name, as passed to ``create_model``.
        url: download URL.
        img_size: input size in pixels at which the accuracies were measured.
        acc1, acc5: published top-1 and top-5 accuracy in percent; acc5 is None if it was not published.
    """

    name: str
    url: str
    img_size: int
    acc1: float
    acc5: float | None


RELEASED: dict[str, Released] = {
    file.name: file
    for file in (
        Released("flatten_pvt_t", f"{_SERVER}/3ab1d773f19d45648690/?dl=1", 224, 77.758, 93.910),
        Released("flatten_pvt_v2_b0", f"{_SERVER}/5d1f01532b104da28e7b/?dl=1", 224, 71.098, 90.596),
        Released("flatten_swin_t", f"{_SERVER}/e1518e76703e4e57a7f2/?dl=1", 224, 82.106, 95.900),
        Released("flatten_swin_s", f"{_SERVER}/94188e52af354bf4a88b/?dl=1", 224, 83.5, None),
        Released("flatten_swin_b", f"{_SERVER}/7a9e5186bad04e7fb3a9/?dl=1", 224, 83.8, None),
        Released("flatten_swin_b_384", f"{_SERVER}/0d0330cf2e5249f1abb6/?dl=1", 384, 85.0, None),
        Released("flatten_cswin_t", f"{_SERVER}/48ba765ba8b0451d9d5a/?dl=1", 224, 83.130, 96.376),
    )
}


def released(name: str) -> Released:
    """The published weight file of a model.

    Raises:
        ValueError: no weights of this model were published.
    """
    if name not in RELEASED:
        raise ValueError(f"{name!r} has no published weights; choose one of {', '.join(sorted(RELEASED))}")
    return RELEASED[name]
