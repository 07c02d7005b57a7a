"""RandAugment on the device: its pixels and its distribution, compared with timm's on Pillow images."""

import random
from collections import Counter

import numpy as np
import pytest
import timm.data.auto_augment
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp, rand_augment_transform
from torch import Tensor

from data.build import build_datasets, build_train_loader, build_train_transform
from data.files import DataError
from data.rand_augment import RandAugment
from utils.config.loading import load_config
from utils.errors import ConfigError
from utils.random import Stream, hash_keys

CPU = torch.device("cpu")
MEAN = (0.5, 0.4, 0.3)
POLICY = "rand-m9-mstd0.5-inc1"


def create(policy: str = POLICY) -> RandAugment:
    return RandAugment(policy, mean=MEAN, interpolation="bicubic", seed=3, device=CPU)


def create_images(count: int, height: int = 40, width: int = 56) -> Tensor:
    """Smooth random images with noise, of different brightness and contrast."""
    generator = torch.Generator().manual_seed(0)
    waves = torch.rand(count, 3, 5, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(waves, (height, width), mode="bicubic")
    low, high = (
        100 * torch.rand(count, 1, 1, 1, generator=generator),
        160 + 95 * torch.rand(count, 1, 1, 1, generator=generator),
    )
    noise = 4 * torch.randn(count, 3, height, width, generator=generator)
    return (low + (high - low) * smooth + noise).clamp(0, 255).to(torch.uint8)


def apply_timm(images: Tensor, name: str, levels: np.ndarray, signs: np.ndarray, monkeypatch) -> Tensor:
    """timm's operation on Pillow images, with the given levels and signs."""
    fill = tuple(round(255 * x) for x in MEAN)
    results = []
    for image, level, sign in zip(images, levels, signs, strict=True):
        monkeypatch.setattr(timm.data.auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
        options = {"img_mean": fill, "interpolation": Image.Resampling.BICUBIC, "magnitude_max": 20}
        operation = AugmentOp(name, prob=1.0, magnitude=10 * level, hparams=options)
        results.append(np.array(operation(Image.fromarray(image.permute(1, 2, 0).numpy()))))
    return torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2)


# Maximum of the mean absolute difference, in grey levels of 255. All other operations differ by at most one level.
GEOMETRIC = {"Rotate": 2.5, "ShearX": 2, "ShearY": 2, "TranslateXRel": 2, "TranslateYRel": 2}


@pytest.mark.parametrize("policy", ["rand-m9-n1", "rand-m9-n1-inc1"])
def test_each_operation_has_the_pixels_of_pillow(policy, monkeypatch):
    augment, images = create(policy), create_images(12)
    images[0] = 77  # no contrast: AutoContrast and Equalize change nothing
    levels, signs = np.linspace(0, 1.2, 12), np.array([1.0, -1.0] * 6)
    assert len(augment.names) == 15
    for position, name in enumerate(augment.names):
        results = augment.apply(images, np.full((12, 1), position), levels[:, None], signs[:, None])
        difference = (results.int() - apply_timm(images, name, levels, signs, monkeypatch).int()).abs()
        if name in GEOMETRIC:
            assert difference.float().mean() < GEOMETRIC[name], name
            assert difference[0].max() <= 1, name  # level 0: the identity
        else:
            inside = difference[..., 1:-1, 1:-1] if name.startswith("Sharpness") else difference
            assert inside.max() <= 1, name


def test_operations_and_magnitudes_have_the_distribution_of_timm(monkeypatch):
    policy, count = "rand-m7-n3-p0.4-mstd2-mmax8", 4000
    recorded = []
    reference = rand_augment_transform(policy, {})
    for operation in reference.ops:
        operation.level_fn = lambda magnitude, _: (magnitude,)
        operation.aug_fn = lambda image, magnitude, *, name=operation.name, **_: recorded.append((name, magnitude)) or image
    random.seed(0)
    np.random.seed(0)
    for _ in range(count):
        reference(None)
    augment = create(policy)
    choices, levels, signs = augment.draw(hash_keys(0, [(0, index) for index in range(count)], Stream.RAND_AUGMENT))
    applied = choices >= 0
    assert applied.sum() == pytest.approx(len(recorded), rel=0.05)
    assert signs.mean() == pytest.approx(0, abs=0.05)
    expected, drawn = Counter(name for name, _ in recorded), Counter(augment.names[choice] for choice in choices[applied])
    assert expected.keys() == drawn.keys()
    assert all(drawn[name] == pytest.approx(expected[name], rel=0.35) for name in expected)
    magnitudes = np.array([magnitude for _, magnitude in recorded])
    for quantile in (0.05, 0.25, 0.5, 0.75):
        assert np.quantile(10 * levels[applied], quantile) == pytest.approx(np.quantile(magnitudes, quantile), abs=0.25)
    assert (levels == 0.8).mean() == pytest.approx((magnitudes == 8).mean(), abs=0.03)


def test_the_result_of_an_image_depends_only_on_its_key_and_not_on_its_batch():
    augment, images, keys = create("rand-m9-n4-p0.9-mstd0.5-inc1"), create_images(64), [(1, index) for index in range(64)]
    batch = augment(images, keys)
    assert ((batch != images).flatten(1).any(1)).sum() > 50
    single = torch.cat([augment(images[i : i + 1], keys[i : i + 1]) for i in range(64)])
    reordered = augment(images.flip(0), keys[::-1]).flip(0)
    assert torch.equal(single, batch)
    assert torch.equal(reordered, batch)
    assert not torch.equal(augment(images, [(2, index) for index in range(64)]), batch)


def test_batches_are_augmented_before_normalisation_instead_of_in_the_workers(toy_config, toy_data):
    opts = ["DATA.DATA_PATH", str(toy_data), "AUG.REPROB", 0.0, "DATA.MEAN", list(MEAN)]
    batches = {}
    for name, policy in (
        ("none", ["AUG.AUTO_AUGMENT", "none", "AUG.COLOR_JITTER", 0.0]),
        ("device", ["AUG.DEVICE_RANDAUGMENT", True]),
    ):
        cfg = load_config(toy_config, [*opts, "AUG.AUTO_AUGMENT", POLICY, *policy])
        loader = build_train_loader(cfg, build_datasets(cfg, training=True).train, rank=0, world_size=1, device=CPU)
        loader.normalize = lambda images: images
        batches[name] = next(iter(loader))
    augment = RandAugment(POLICY, mean=MEAN, interpolation="bicubic", seed=cfg.SEED, device=CPU)
    plain, augmented = batches["none"], batches["device"]
    assert plain.keys.tolist() == augmented.keys.tolist()
    assert augmented.images.dtype == torch.uint8
    assert torch.equal(augmented.images, augment(plain.images, plain.keys))
    assert not torch.equal(augmented.images, plain.images)


def test_images_do_not_depend_on_workers_processes_and_the_first_update_of_a_resumed_run(toy_config, toy_data):
    def read(*opts, first_update=0, **placement) -> dict[int, Tensor]:
        cfg = load_config(toy_config, ["DATA.DATA_PATH", str(toy_data), "AUG.DEVICE_RANDAUGMENT", True, *opts])
        placement = {"rank": 0, "world_size": 1} | placement
        loader = build_train_loader(cfg, build_datasets(cfg, training=True).train, device=CPU, **placement)
        loader.set_position(1, first_update)
        return {index: image for batch in loader for index, image in zip(batch.indices, batch.images, strict=True)}

    expected = read()
    resumed = read("DATA.NUM_WORKERS", 2, first_update=2)
    process = read("DATA.BATCH_SIZE", 4, rank=1, world_size=2)
    assert 0 < len(resumed) < len(expected)
    assert 0 < len(process) < len(expected)
    assert all(torch.equal(image, expected[index]) for images in (resumed, process) for index, image in images.items())


def test_policies_that_are_not_supported_are_rejected_before_the_run():
    config = "configs/flatten_swin_t.yaml"
    for policy in ("rand-m9-tweights", "rand-m9-t3a"):
        cfg = load_config(config, ["AUG.DEVICE_RANDAUGMENT", True, "AUG.AUTO_AUGMENT", policy])
        with pytest.raises(DataError, match=r"AUG\.DEVICE_RANDAUGMENT does not support AUG\.AUTO_AUGMENT='rand-m9-t"):
            build_train_transform(cfg)
    for policy in ("none", "augmix-m5"):
        with pytest.raises(ConfigError, match=r"AUG\.DEVICE_RANDAUGMENT=True has no effect"):
            load_config(config, ["AUG.DEVICE_RANDAUGMENT", True, "AUG.AUTO_AUGMENT", policy])
