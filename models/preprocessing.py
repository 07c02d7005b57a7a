"""Evaluation preprocessing: one set of rules for the transforms in ``data`` and for a model's ``pretrained_cfg``."""

import math
from dataclasses import dataclass

MAX_SMALL_SIZE = 32  # pixels; up to this size, training crops from a padded image, and evaluation does not crop


def deterministic(interpolation: str) -> str:
    """Replace ``random`` interpolation by bilinear, as the reference implementation does in evaluation."""
    return "bilinear" if interpolation == "random" else interpolation


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Evaluation preprocessing of an image.

    Args:
        img_size: (height, width) of the model's input in pixels.
        crop_mode: ``squash`` resizes both sides to ``img_size / crop_pct``, ignoring the aspect ratio, and crops the
            centre; ``short`` resizes the shorter side to that size, keeps the aspect ratio, and crops the centre; ``none``
            resizes to ``img_size``.
        crop_pct: ratio of the centre crop's side to the resized image's side.
        interpolation: bicubic, bilinear or random (random is replaced by bilinear).
        mean, std: per channel, for pixel values in [0, 1].
        exif: apply the EXIF orientation of the file.
    """

    img_size: tuple[int, int]
    crop_mode: str
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    exif: bool = False

    @property
    def effective_crop_pct(self) -> float:
        """``crop_pct``, or 1 if nothing is cropped: with ``none``, and for small images."""
        return 1.0 if self.crop_mode == "none" or max(self.img_size) <= MAX_SMALL_SIZE else self.crop_pct

    @property
    def timm_crop_mode(self) -> str:
        """timm's name of ``crop_mode``; ``none`` becomes ``squash``, which does not crop at an effective ``crop_pct`` of 1."""
        return "center" if self.crop_mode == "short" else "squash"

    @property
    def resized_to(self) -> tuple[int, int]:
        """(height, width) before the crop; with ``short``, the size that the resized image must cover."""
        height, width = (math.floor(side / self.effective_crop_pct) for side in self.img_size)
        return height, width

    def timm_options(self) -> dict:
        """Crop and interpolation, by timm's names in ``create_transform`` and in ``pretrained_cfg``."""
        return {
            "interpolation": deterministic(self.interpolation),
            "crop_mode": self.timm_crop_mode,
            "crop_pct": self.effective_crop_pct,
        }

    def to_dict(self) -> dict:
        """Convert to plain data for ``eval.json``, with a square size as one number."""
        return {
            "img_size": _compact_size(self.img_size),
            "resized_to": _compact_size(self.resized_to),
            "crop_mode": self.crop_mode,
            "crop_pct": self.effective_crop_pct,
            "interpolation": deterministic(self.interpolation),
            "mean": list(self.mean),
            "std": list(self.std),
            "exif": self.exif,
        }

    def __str__(self) -> str:
        upright = "turned upright by the EXIF orientation, " if self.exif else ""
        size, resized = ("{} x {}".format(*pair) for pair in (self.img_size, self.resized_to))
        mode = deterministic(self.interpolation)
        if self.crop_mode == "short":
            return f"{upright}resized to at least {resized} pixels with the aspect ratio kept ({mode}), centre crop of {size}"
        if size == resized:
            return f"{upright}resized to {size} pixels ({mode}), no crop"
        return f"{upright}resized to {resized} pixels, ignoring the aspect ratio ({mode}), centre crop of {size}"


def _compact_size(size: tuple[int, int]) -> int | list[int]:
    """One number for a square, else [height, width]."""
    return size[0] if size[0] == size[1] else list(size)
