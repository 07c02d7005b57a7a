"""From a decoded image to the uint8 tensor that travels, and from there to what the model sees."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor, str_to_interp_mode
from torch import Tensor
from torchvision import transforms

from data.datasets import Key, draw_seed, kept_generators, seed_generators

Transform = Callable[[Image.Image], Tensor]

SMALL = 32  # up to this size images come as they are: padded crops in training, no margin in evaluation
SEED_OF_ERASING = 1  # apart from the seed of the same image's other draws


def create_train_transform(
    img_size: int,
    *,
    interpolation: str,
    mean: Sequence[float],
    scale: Sequence[float],
    ratio: Sequence[float],
    hflip: float,
    color_jitter: float,
    auto_augment: str,
) -> Transform:
    """The recipe's augmentation up to uint8; erasing follows on the device, on normalised values."""
    augment = create_transform(
        img_size,
        is_training=True,
        interpolation=interpolation,
        mean=tuple(mean),
        scale=tuple(scale),
        ratio=tuple(ratio),
        hflip=hflip,
        color_jitter=color_jitter or None,
        auto_augment=None if auto_augment in ("", "none", "None") else auto_augment,
        use_prefetcher=True,
    )
    if img_size > SMALL:
        return augment
    size = (img_size, img_size)
    crop = [
        transforms.Resize(size, str_to_interp_mode("bicubic" if interpolation == "random" else interpolation)),
        transforms.RandomCrop(img_size, padding=4),
    ]
    return transforms.Compose([*crop, *augment.transforms[1:]])


def resized_side(img_size: int, *, crop: bool) -> int:
    """Pixels of the square that evaluation resizes to, before it takes the centre."""
    return int(256 / 224 * img_size) if crop and img_size > SMALL else img_size


def create_eval_transform(img_size: int, *, interpolation: str, crop: bool) -> Transform:
    """Resize to a square, whatever the shape was, and take the centre if ``crop``: as released numbers were measured."""
    resized = resized_side(img_size, crop=crop)
    mode = str_to_interp_mode("bicubic" if interpolation == "random" else interpolation)
    return transforms.Compose(
        [transforms.Resize((resized, resized), mode), transforms.CenterCrop(img_size), MaybePILToTensor()]
    )


class Normalize:
    """uint8 in [0, 255] to normalised floats, on the images' device. (B, 3, H, W) -> the same."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device):
        self.mean = 255 * torch.tensor(mean, device=device).view(3, 1, 1)
        self.scale = 1 / (255 * torch.tensor(std, device=device).view(3, 1, 1))

    def __call__(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) * self.scale


class Erase:
    """Random erasing (https://arxiv.org/abs/1708.04896) of normalised images, drawn from (seed, epoch, index)."""

    def __init__(self, probability: float, *, mode: str, max_count: int, seed: int, device: torch.device):
        self.seed, self.device = seed, device
        self.erase = RandomErasing(probability, mode=mode, max_count=max_count, device=device)

    def __call__(self, images: Tensor, keys: Sequence[Key]) -> Tensor:
        """images: (B, 3, H, W), changed in place; keys: (epoch, index) of each."""
        with kept_generators():
            for image, key in zip(images, keys, strict=True):
                seed_generators(draw_seed(self.seed, *key, SEED_OF_ERASING), self.device)
                self.erase(image)
        return images
