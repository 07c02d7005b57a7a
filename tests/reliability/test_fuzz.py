"""Fuzz tests of file readers: arbitrary or damaged content is read, or raises one of the project's own exceptions."""

import random
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.classes import read_class_map, read_real_labels
from data.files import DataError
from engine.checkpoint_writer import save_checkpoint
from models.checkpoints.reader import CheckpointError, read_checkpoint
from tests.conftest import CONFIGS
from tests.engine.test_checkpoint import toy
from tests.indices import index_zip
from utils.config.loading import load_config
from utils.errors import ConfigError

pytestmark = [pytest.mark.reliability, pytest.mark.filterwarnings("ignore")]
FUZZ_SETTINGS = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def damaged(content: bytes, seed: int) -> bytes:
    """Change 1 to 5 bytes, and truncate the result with a probability of 0.3."""
    rng, changed = random.Random(seed), bytearray(content)
    for _ in range(rng.randrange(1, 6)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed[: rng.randrange(len(changed) + 1)] if rng.random() < 0.3 else changed)


@given(content=st.binary(max_size=400), name=st.sampled_from(["x.pth", "x.safetensors"]))
@FUZZ_SETTINGS
def test_arbitrary_bytes_are_rejected_as_a_checkpoint(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / name)


def test_damaged_checkpoints_are_read_or_rejected(tmp_path):
    path, num_rejected = tmp_path / "x.pth", 0
    save_checkpoint({"model": toy().state_dict(), "num_updates": 1}, path)
    content = path.read_bytes()
    for seed in range(1500):
        path.write_bytes(damaged(content, seed))
        try:
            read_checkpoint(path)
        except CheckpointError:
            num_rejected += 1
    assert num_rejected > 1000


YAML = st.text(alphabet="ABCDEFMODELTRAINDATA:._-{}[]&*!?|>'\"# \n\t0123456789eé", max_size=80)


@given(text=YAML | st.text(max_size=80))
@FUZZ_SETTINGS
def test_arbitrary_text_is_read_as_a_config_or_rejected(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    with suppress(ConfigError):
        load_config(tmp_path / "x.yaml")


def test_damaged_configs_are_read_or_rejected(tmp_path):
    content = (CONFIGS / "flatten_swin_b_384.yaml").read_bytes() + b"DATA: {IMG_SIZE: [96, 128], BATCH_SIZE: 64}\n"
    for seed in range(1500):
        (tmp_path / "x.yaml").write_bytes(damaged(content, seed))
        with suppress(ConfigError):
            load_config(tmp_path / "x.yaml")


LINES = st.lists(st.text(alphabet="ab.0123456789\t \\/-\r\x85²٣", max_size=12), max_size=6).map("\n".join)


@given(content=LINES.map(str.encode) | st.binary(max_size=60))
@FUZZ_SETTINGS
def test_arbitrary_map_files_of_zip_archives_are_read_or_rejected(content, tmp_path):
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("a", b"x")
    (tmp_path / "train_map.txt").write_bytes(content)
    with suppress(DataError):
        index_zip(tmp_path, "train")


@given(content=LINES.map(str.encode) | st.binary(max_size=60))
@FUZZ_SETTINGS
def test_arbitrary_class_maps_and_label_files_are_read_or_rejected(content, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(content)
    for read in (lambda: read_class_map(str(path), ["a", "b"], 10), lambda: read_real_labels(str(path), ["a_00000001.png"])):
        with suppress(DataError):
            read()


def test_damaged_zip_archives_are_read_or_rejected(tmp_path):
    path: Path = tmp_path / "train.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a.png", "b.png"):
            archive.writestr(name, b"x" * 40)
    (tmp_path / "train_map.txt").write_text("a.png\t0\nb.png\t1\n")
    content = path.read_bytes()
    for seed in range(1500):
        path.write_bytes(damaged(content, seed))
        with suppress(DataError):
            index_zip(tmp_path, "train")
