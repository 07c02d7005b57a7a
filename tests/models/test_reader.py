"""Structure and values of weight files: whatever a file contains, it is read, or rejected by one error within seconds."""

import argparse
import io
import json
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.checkpoints.reader import CheckpointError, choose_weights, preferred_weights, read_checkpoint

WEIGHTS = {"weight": torch.arange(6.0)}


def read(state, tmp_path):
    torch.save(state, tmp_path / "x.pth")
    return read_checkpoint(tmp_path / "x.pth")


def shared_references(depth, create):
    value = 1
    for _ in range(depth):
        value = create(value)
    return value


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (shared_references(60, lambda value: [value, value]), "levels deep"),
        (shared_references(28, lambda value: {"a": value, "b": value}), "has more than 5000000 values"),
        (shared_references(28, lambda value: (value, value)), "has more than 5000000 values"),
        (shared_references(40, lambda value: [value]), "is nested more than 32 levels deep"),
        (torch.zeros(1).expand(10**12), "of which the file has only 4"),
        (torch.zeros(1).as_strided((1000, 1000), (0, 0)), "of which the file has only 4"),
        (torch.zeros(3, device="meta"), "is a tensor without data, on the device meta"),
        (torch.eye(3).to_sparse(), "only dense tensors are allowed"),
        (torch.zeros(2, dtype=torch.complex64), "type complex64, which is not supported"),
        (torch.zeros(2, dtype=torch.float8_e4m3fn), "type float8_e4m3fn, which is not supported"),
        ({None: 1}, "entry has a key of type NoneType"),
        ({(1, 2): 1}, "entry has a key of type tuple"),
        ({0.0: 1}, "entry has a key of type float"),
        ({True: 1}, "entry has a key of type bool"),
        ("a" * 2_000_000, "entry has 2000000 characters"),
        (10**100, "entry is an integer of more than 64 bits"),
        (1j, "entry is of type complex, which is not plain data"),
    ],
    ids=range(17),
)
@pytest.mark.filterwarnings("ignore")
def test_an_odd_structure_is_rejected_within_seconds_and_the_error_names_the_entry(entry, message, tmp_path):
    started = time.process_time()
    with pytest.raises(CheckpointError, match=message) as caught:
        read({"model": WEIGHTS, "entry": entry}, tmp_path)
    assert "entry" in str(caught.value)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            (name, value)
            for name in ("num_updates", "num_skipped", "updates_per_epoch")
            for value in (-1, 10**18, True, 1.0, "1")
        ],
        *[("best.acc1", value) for value in (float("nan"), float("inf"), 101.0, -2.0, True, "80", None)],
        *[("best.num_updates", value) for value in (-2, 10**18, False, 1.5)],
        *[("best.weights", value) for value in ("../x", 3, None)],
        *[("class_names", value) for value in ([None], [["a"]], ["a", {"b": 1}])],
        ("config.DATA.IMG_SIZE", torch.zeros(2)),
    ],
)
def test_illegal_values_in_a_checkpoint_of_this_project_are_rejected_and_the_error_names_the_entry(name, value, tmp_path):
    best = {"acc1": 50.0, "weights": "raw", "epoch": 1, "num_updates": 5}
    state = {"model": WEIGHTS, "num_updates": 5, "best": best, "class_names": ["a"], "config": {"DATA": {}}}
    assert read(state, tmp_path)["best"] == best
    *sections, leaf = name.split(".")
    node = state
    for section in sections:
        node = node[section]
    node[leaf] = value
    with pytest.raises(CheckpointError, match=name):
        read(state, tmp_path)


def test_the_number_of_class_names_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr("models.checkpoints.reader.MAX_CLASSES", 3)
    with pytest.raises(CheckpointError, match="class_names has 4 names; at most 3"):
        read({"model": WEIGHTS, "class_names": ["a"] * 4}, tmp_path)


def test_entries_of_other_projects_are_not_checked_for_the_values_of_this_project(tmp_path):
    others = {"best": 3, "epoch": -7, "args": argparse.Namespace(lr=[1]), "accuracy": np.float64(82.1), "count": np.int64(2)}
    others |= {"class_names": {"a": 1}, "milestones": {30: 1}, "shape": torch.Size([2]), "flag": np.bool_(True)}
    assert read({"model": WEIGHTS, **others}, tmp_path).keys() == {"model", *others}


@pytest.mark.parametrize("metadata", ["{", "", "[" * 100_000, "9" * 5000, '{"a": ' * 50_000, "\\ud800"])
def test_invalid_metadata_of_a_valid_safetensors_file_is_an_error(metadata, tmp_path):
    save_file(WEIGHTS, tmp_path / "x.safetensors", metadata={"flatten": metadata})
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [{"model": {"weight": 1}}, {"model": None, "class_names": ["a"]}])
def test_metadata_of_a_safetensors_file_cannot_replace_its_tensors(content, tmp_path):
    save_file(WEIGHTS, tmp_path / "x.safetensors", metadata={"flatten": json.dumps(content)})
    _, weights = choose_weights(read_checkpoint(tmp_path / "x.safetensors"), "auto", "x")
    assert torch.equal(weights["weight"], WEIGHTS["weight"])


@pytest.mark.parametrize("header", [b"{}" + b" " * 100, b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}', b"[]", b"{"])
def test_odd_headers_of_safetensors_files_are_read_or_rejected(header, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_checkpoint(tmp_path / "x.safetensors")


def test_a_compressed_archive_is_rejected_before_it_is_unpacked(tmp_path):
    torch.save({"model": WEIGHTS}, tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as archive,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name))
        bomb.writestr("archive/data/1", bytes(10_000_000))
    with pytest.raises(CheckpointError, match="but the file has"):
        read_checkpoint(tmp_path / "bomb.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_nested_encodings_that_multiply_the_length_of_bytes_are_not_executed(legacy, tmp_path):
    """35 nested calls of codecs.encode with hex would need 32 GiB."""
    text = b"\x80\x02" + b"c_codecs\nencode\n" * 35 + b"X\x01\x00\x00\x00a" + b"X\x06\x00\x00\x00latin1\x86R"
    text += b"X\x03\x00\x00\x00hex\x86R" * 34 + b"."
    torch.save({"model": WEIGHTS}, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    path = tmp_path / "bomb.pth"
    if legacy:
        heads = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(head, protocol=2) for head in heads) + text)
    else:
        with zipfile.ZipFile(tmp_path / "x.pth") as archive, zipfile.ZipFile(path, "w") as bomb:
            for name in archive.namelist():
                bomb.writestr(name, text if name.endswith("data.pkl") else archive.read(name))
    with pytest.raises(CheckpointError, match=r"codecs\.encode with the codec hex"):
        read_checkpoint(path)
    buffer = io.BytesIO()
    torch.save({"model": WEIGHTS, "accuracy": np.float64(0.5)}, buffer, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(buffer.getvalue())
    assert read_checkpoint(path)["accuracy"] == 0.5


def test_auto_uses_the_evaluation_of_this_checkpoint_and_not_that_of_another_one():
    best = {"acc1": 50.0, "weights": "raw", "epoch": 1, "num_updates": 5}
    both = {"model": WEIGHTS, "state_dict_ema": WEIGHTS, "best": best}
    assert preferred_weights(both | {"num_updates": 5}) == "raw"
    assert preferred_weights(both | {"num_updates": 9}) == "ema"
    assert preferred_weights({"model": WEIGHTS, "best": best | {"weights": "ema"}, "num_updates": 9}) == "raw"
