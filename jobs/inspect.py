"""Load images to inspect a model's attention, and draw attention maps during training."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from yacs.config import CfgNode

from analysis.pages import trace
from analysis.pictures import Figure, draw_forms
from data.build import build_preprocessing
from data.datasets import FileDataset
from data.files import DataError
from data.transforms import Normalize, create_eval_transform
from utils.errors import ConfigError


class InspectedImages:
    """Image files, read with the evaluation preprocessing, as PIL images and as normalised tensors.

    Raises:
        DataError: from ``read``, if the file cannot be read.
    """

    def __init__(self, paths: Sequence[Path], cfg: CfgNode):
        preprocessing = build_preprocessing(cfg)
        self.paths = paths
        self._files = FileDataset(paths, create_eval_transform(preprocessing), exif=preprocessing.exif)
        self._normalize = Normalize(preprocessing.mean, preprocessing.std, torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, position: int) -> tuple[Image.Image, Tensor]:
        """Read an image: the preprocessed image before normalisation, and the normalised (3, H, W) tensor."""
        _, pixels, decode_error = self._files[position]
        if pixels is None:
            raise DataError(f"{self.paths[position]}: not a readable image ({decode_error})")
        return Image.fromarray(pixels.permute(1, 2, 0).numpy()), self._normalize(pixels.unsqueeze(0))[0]


class AttentionPictures:
    """Draws the attention maps of a model for one image (ATTENTION_IMAGE).

    Raises:
        ConfigError: the image cannot be read.
    """

    def __init__(self, cfg: CfgNode, device: torch.device):
        try:
            self.picture, image = InspectedImages([Path(cfg.ATTENTION_IMAGE)], cfg).read(0)
        except DataError as error:
            raise ConfigError(f"ATTENTION_IMAGE={cfg.ATTENTION_IMAGE}: {error}; give an image file") from None
        self.image = image.to(device)

    def __call__(self, model: nn.Module) -> Iterator[tuple[str, Figure]]:
        """Yield the name and figure of each attention module. The model runs in evaluation mode, then its mode is restored."""
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            blocks = trace(model, self.image, forms=())  # draw only the attention that the model itself uses
        finally:
            for module, training in modes.items():
                module.training = training
        for block in blocks:
            yield f"attention/{block.name}", draw_forms(self.picture, block)
