import argparse
import datetime
import errno
import io
import os
import pickle
import random
import shutil
import stat
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch
from timm.data import ImageNetInfo
from yacs.config import CfgNode

from engine import checkpoint_writer
from engine.checkpoint_writer import save_checkpoint
from engine.run_contents import survey
from engine.state import NO_BEST
from models import create_model
from models.checkpoints.reader import CheckpointError, read_checkpoint, stored_weights, verify
from models.swin import SwinTransformer
from tests.runs import load_weights, run_state


def toy(**options):
    defaults = {"img_size": 32, "num_classes": 5, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "attn_type": "LS"}
    return SwinTransformer(**{**defaults, **options})


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint_000000001.pth"
    save_checkpoint({"model": toy().state_dict(), "num_updates": 1}, path)
    return path


def test_a_saved_checkpoint_is_readable_and_its_file_mode_follows_the_umask(saved):
    state = read_checkpoint(saved)
    assert state["num_updates"] == 1
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("operation", ["open", "fsync", "replace"])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(saved, operation, monkeypatch):
    before = checkpoint_writer.sha256(saved)

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_writer if operation == "open" else os, operation, fail, raising=False)
    with pytest.raises(CheckpointError, match="existing checkpoints are untouched"):
        save_checkpoint({"model": {}}, saved)
    monkeypatch.undo()
    assert checkpoint_writer.sha256(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def damage(path, how):
    """Empty a file, truncate it, or flip one bit of its largest tensor. ``how`` also seeds the random position."""
    data = bytearray(path.read_bytes())
    rng = random.Random(how)
    if how == "empty":
        data = b""
    elif how.startswith("cut"):
        data = data[: rng.randrange(len(data))]
    else:
        with zipfile.ZipFile(path) as archive:
            content = archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))
        data[data.index(content) + rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["empty", *(f"cut{n}" for n in range(8)), *(f"flip{n}" for n in range(16))])
def test_a_damaged_checkpoint_is_detected_and_the_previous_one_is_used(saved, how, caplog):
    newer = saved.with_name("checkpoint_000000002.pth")
    for number, path in ((1, saved), (2, newer)):
        save_checkpoint(run_state(num_updates=number) | {"model": toy().state_dict()}, path)
    damage(newer, how)
    with pytest.raises(CheckpointError, match=newer.name):
        verify(newer)
    with pytest.raises(CheckpointError, match=newer.name):
        read_checkpoint(newer)
    assert [candidate.path for candidate in survey(saved.parent).usable] == [saved]
    assert "it is not used" in caplog.text


@pytest.mark.parametrize("copy_is_damaged", [False, True])
def test_without_hard_links_best_pth_becomes_a_verified_copy_or_remains_unchanged(copy_is_damaged, saved, monkeypatch):
    best = saved.with_name("best.pth")
    shutil.copy(saved, best)
    before, synced, original_fsync = best.read_bytes(), [], os.fsync

    def refuse(*_arguments):
        raise OSError(1, "Operation not permitted")

    def copy_truncated(source, target):
        target.write_bytes(source.read_bytes()[:-100])

    def fsync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        original_fsync(descriptor)

    save_checkpoint({"model": toy().state_dict(), "num_updates": 2}, saved)
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fsync", fsync)
    if copy_is_damaged:
        monkeypatch.setattr(shutil, "copyfile", copy_truncated)
        with pytest.raises(CheckpointError, match="existing checkpoints are untouched"):
            checkpoint_writer.link_best(saved, best)
        assert best.read_bytes() == before
    else:
        checkpoint_writer.link_best(saved, best)
        assert best.read_bytes() == saved.read_bytes() != before
        assert os.stat(best).st_ino != os.stat(saved).st_ino
    assert any(name.endswith("best.pth.incomplete") for name in synced)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["best.pth", saved.name]


@pytest.mark.parametrize("operation", ["open", "fsync"])
def test_a_checkpoint_is_saved_on_a_file_system_without_fsync_of_directories(operation, saved, monkeypatch):
    originals = {"open": os.open, "fsync": os.fsync}

    def refuse(target, *arguments):
        path = target if operation == "open" else os.readlink(f"/proc/self/fd/{target}")
        if os.path.isdir(path):
            raise OSError(22, "Invalid argument")
        return originals[operation](target, *arguments)

    monkeypatch.setattr(os, operation, refuse)
    save_checkpoint({"model": {}, "num_updates": 2}, saved)
    assert read_checkpoint(saved)["num_updates"] == 2


def test_free_space_is_measured_after_the_temporary_file_is_deleted(saved, monkeypatch):
    def fail(_descriptor):
        raise OSError(28, "No space left on device")

    def usage(folder):
        assert [path.name for path in folder.iterdir()] == [saved.name]
        return shutil._ntuple_diskusage(10, 3, 7)

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(CheckpointError, match=r"40 bytes needed, 7 free"):
        save_checkpoint({"model": {"weight": torch.zeros(10)}}, saved)


@pytest.mark.parametrize("cause", ["directory removed", "no inodes", "disk error", "disk full"])
def test_the_error_of_a_failed_write_gives_its_cause_and_a_fitting_remedy(cause, saved, monkeypatch):
    def fail(error_number):
        def replacement(_descriptor):
            raise OSError(error_number, os.strerror(error_number))

        monkeypatch.setattr(os, "fsync", replacement)

    if cause == "directory removed":
        shutil.rmtree(saved.parent)
        expected = "No such file or directory.*cannot be accessed"
    elif cause == "no inodes":
        fail(errno.ENOSPC)
        full = types.SimpleNamespace(f_files=1000, f_favail=0, f_frsize=1, f_blocks=100, f_bfree=90, f_bavail=90)
        monkeypatch.setattr(os, "statvfs", lambda _: full)
        expected = "No space left on device.*no inodes left"
    elif cause == "disk error":
        fail(errno.EIO)
        expected = "Input/output error.*Check the file system"
    else:
        fail(errno.ENOSPC)
        expected = r"No space left on device.*\(40 bytes needed, \d+ free\) Free disk space"
    with pytest.raises(CheckpointError, match=expected) as caught:
        save_checkpoint({"model": {"weight": torch.zeros(10)}}, saved)
    assert ("Free disk space" in str(caught.value)) == (cause == "disk full")


def test_files_whose_names_do_not_match_the_checkpoint_pattern_are_neither_listed_nor_deleted(saved):
    others = ["checkpoint_12.pth", "checkpoint_mean.pth", "checkpoint_mean.pth.incomplete", "mine.incomplete"]
    for name in [*others, "checkpoint_000000002.pth.incomplete"]:
        (saved.parent / name).write_bytes(b"")
    assert checkpoint_writer.list_checkpoints(saved.parent) == [saved]
    checkpoint_writer.remove_surplus(saved.parent, keep=1, newest=saved)
    assert sorted(path.name for path in saved.parent.iterdir()) == sorted([saved.name, *others])


def test_a_damaged_file_is_renamed_without_overwriting_earlier_ones(saved):
    for _ in range(2):
        newer = saved.with_name("checkpoint_000000002.pth")
        newer.mkdir()  # a directory counts as a damaged checkpoint
        checkpoint_writer.set_aside(newer, "damaged")
    assert len(list(saved.parent.glob("checkpoint_000000002.pth.damaged*"))) == 2


def test_find_best_accepts_only_the_checkpoint_of_the_best_evaluation(saved):
    """A damaged file, or a checkpoint with another update or accuracy, is not accepted."""
    best, state = saved.with_name("best.pth"), {"num_updates": 9, "best": {"acc1": 50.0, "num_updates": 5}}
    save_checkpoint({"num_updates": 5, "best": state["best"]}, best)
    assert checkpoint_writer.find_best(best.parent, state, saved) == best
    for other in ({"num_updates": 5, "best": {"acc1": 40.0, "num_updates": 5}}, {"num_updates": 4, "best": state["best"]}):
        save_checkpoint(other, best)
        assert checkpoint_writer.find_best(best.parent, state, saved) is None
    damage(best, "empty")
    assert checkpoint_writer.find_best(best.parent, state, saved) is None


def test_a_best_checkpoint_that_is_no_longer_compared_is_kept_under_another_name_unless_it_is_damaged(saved):
    best, content = saved.with_name("best.pth"), saved.read_bytes()
    for kept in ("best_000000001.pth", "best_000000001_.pth"):
        best.write_bytes(content)
        os.link(best, best.with_name("top_000000001.pth"))
        best.with_name("top_000000002.pth").write_bytes(content + kept.encode())
        checkpoint_writer.keep_former_best(best.parent)
        assert saved.with_name(kept).read_bytes() == content
        assert saved.with_name(kept.replace("1", "2")).read_bytes() == content + kept.encode()
        assert not list(best.parent.glob("top_*"))
    best.write_bytes(content)
    damage(best, "flip")
    checkpoint_writer.keep_former_best(best.parent)
    assert not best.exists()
    assert best.with_name("best.pth.damaged").exists()


def test_a_run_without_an_evaluation_needs_no_best_checkpoint(saved):
    best = saved.with_name("best.pth")
    assert checkpoint_writer.find_best(saved.parent, {"num_updates": 9, "best": dict(NO_BEST)}, saved) == best
    assert not saved.with_name("best.pth").exists()


def test_checkpoint_rotation_keeps_the_newest_and_the_best(saved):
    """Rotation follows the numbers of the checkpoints, also if a copy has changed the order of their modification times."""
    for number in range(2, 6):
        path = checkpoint_writer.checkpoint_path(saved.parent, number)
        shutil.copy(saved, path)
        os.utime(path, (1e9 - number, 1e9 - number))
    checkpoint_writer.link_best(saved, saved.parent / "best.pth")
    checkpoint_writer.remove_surplus(saved.parent, keep=2, newest=path)
    assert sorted(path.name for path in saved.parent.iterdir()) == [
        "best.pth",
        "checkpoint_000000004.pth",
        "checkpoint_000000005.pth",
    ]


class Call:
    """An object whose unpickling calls ``function``."""

    def __init__(self, function, *arguments):
        self.function = function
        self.arguments = arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("payload", ["system", "eval", "nested", "getattr"])
def test_code_in_a_checkpoint_is_not_executed(tmp_path, payload):
    flag = tmp_path / "ran"
    inner = pickle.dumps(Call(os.system, f"touch {flag}"))
    payloads = {
        "system": Call(os.system, f"touch '{flag}'"),
        "eval": Call(eval, f"open({str(flag)!r}, 'w')"),
        "nested": Call(torch.storage._load_from_bytes, inner),
        "getattr": Call(getattr, "text", "upper"),
    }
    torch.save({"model": toy().state_dict(), "x": payloads[payload]}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="contains code: it requires"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not flag.exists()


def test_code_in_a_checkpoint_of_the_oldest_format_is_not_executed(tmp_path):
    """Up to version 0.1, torch saved checkpoints as tar files of pickles."""
    flag = tmp_path / "ran"
    payload = pickle.dumps(Call(os.system, f"touch '{flag}'"))
    with tarfile.open(tmp_path / "evil.pth", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(payload)
            archive.addfile(entry, io.BytesIO(payload))
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not flag.exists()


def test_a_checkpoint_of_the_reference_implementation_loads_with_its_pickled_config(tmp_path):
    config = CfgNode({"MODEL": CfgNode({"TYPE": "flatten_swin"}), "TRAIN": {"BASE_LR": 5e-4}})
    model = toy()
    state = {
        "model": {f"module.{name}": value for name, value in model.state_dict().items()},
        "optimizer": {},
        "lr_scheduler": {},
        "max_accuracy": 82.1,
        "epoch": 299,
        "config": config,
    }
    state["model"]["module.layers.1.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16)
    torch.save(state, tmp_path / "ckpt.pth")
    assert read_checkpoint(tmp_path / "ckpt.pth")["config"]["MODEL"]["TYPE"] == "flatten_swin"
    loaded = toy()
    report = load_weights(loaded, tmp_path / "ckpt.pth")
    assert (report.missing, report.unused, report.resized, report.reinitialised) == ([], [], [], [])
    assert report.coverage == 1
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_argparse_namespaces_and_numpy_scalars_in_released_checkpoints_are_read_as_data(tmp_path):
    extras = {
        "args": argparse.Namespace(lr=1, name="x"),
        "best": np.float64(82.1),
        "epoch": np.int64(299),
        "f": np.float32(0.5),
    }
    torch.save({"model": toy().state_dict(), **extras}, tmp_path / "released.pth")
    state = read_checkpoint(tmp_path / "released.pth")
    assert {key: state[key] for key in extras} == extras
    assert load_weights(toy(), tmp_path / "released.pth").coverage == 1


def test_checkpoint_entries_other_than_named_tensors_are_ignored(tmp_path):
    state = {"model": toy().state_dict() | {"epoch": 3, 7: torch.zeros(1)}, "model_ema": torch.zeros(1)}
    torch.save(state, tmp_path / "odd.pth")
    report = load_weights(toy(), tmp_path / "odd.pth")
    assert (report.weights, report.coverage, report.unused) == ("raw", 1, [])


def test_a_pickled_class_that_is_not_allowed_is_named_in_the_error(tmp_path):
    torch.save({"model": {}, "when": datetime.date(2023, 10, 2)}, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match=r"datetime\.date"):
        read_checkpoint(tmp_path / "foreign.pth")


def test_ema_and_raw_weights_are_distinguished(tmp_path):
    raw, ema = toy(), toy()
    torch.save({"model": raw.state_dict(), "state_dict_ema": ema.state_dict()}, tmp_path / "both.pth")
    for weights, expected in (("raw", raw), ("ema", ema), ("auto", ema)):
        model = toy()
        assert load_weights(model, tmp_path / "both.pth", weights=weights).weights == ("raw" if expected is raw else "ema")
        assert torch.equal(model.head.weight, expected.head.weight)
    torch.save(raw.state_dict(), tmp_path / "bare.pth")
    assert load_weights(toy(), tmp_path / "bare.pth").weights == "raw"
    with pytest.raises(CheckpointError, match="contains no ema weights"):
        load_weights(toy(), tmp_path / "bare.pth", weights="ema")


def test_a_head_with_another_number_of_classes_keeps_its_initial_weights_and_is_reported(tmp_path):
    torch.save({"model": toy().state_dict()}, tmp_path / "five.pth")
    model = toy(num_classes=3)
    initial = model.head.weight.clone()
    report = load_weights(model, tmp_path / "five.pth")
    assert sorted(report.reinitialised) == ["head.bias", "head.weight"]
    assert torch.equal(model.head.weight, initial)
    assert "head: 5 classes in the file, 3 in the model" in str(report)


def test_a_file_of_another_model_is_rejected(tmp_path):
    torch.save({"model": toy(embed_dim=16).state_dict()}, tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match="choose the config"):
        load_weights(toy(), tmp_path / "wide.pth")
    half = dict(list(toy().state_dict().items())[:10])
    torch.save({"model": half}, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match="missing"):
        load_weights(toy(), tmp_path / "half.pth")


# Number of parameter tensors whose shape depends on the image size, in the smallest model of each family. Linear attention
# adds a positional encoding (PE) to its keys; position embeddings are added to the tokens at the input of a model or stage.
# Swin: PE of the 4 blocks in stages 1 and 2, and relative position bias tables of the 8 softmax blocks, whose windows grow from
# 7 x 7 to 12 x 12 tokens. PVT: 4 position embeddings, and PE of 8 blocks. PVTv2: PE of 8 blocks. CSwin: PE of the 6 blocks in
# stages 1 and 2. DeiT: the position embedding, and PE of 12 blocks.
NUM_RESIZED = {"flatten_swin_t": 12, "flatten_pvt_t": 12, "flatten_pvt_v2_b0": 8, "flatten_cswin_t": 6, "flatten_deit_t": 13}


@pytest.mark.parametrize("size", [384, 448])
@pytest.mark.parametrize("name", NUM_RESIZED)
def test_every_entry_is_loaded_or_resized_at_a_higher_resolution(name, size, tmp_path):
    source = create_model(name, num_classes=10)
    torch.save({"model": source.state_dict()}, tmp_path / "224.pth")
    options = {"softmax_window": 12} if "swin_t" in name and "cswin" not in name else {}  # as in the Swin config for 384 pixels
    model = create_model(name, num_classes=10, img_size=size, **options)
    target = model.state_dict()
    report = load_weights(model, tmp_path / "224.pth")
    grown = [entry for entry, value in source.state_dict().items() if value.shape != target[entry].shape]
    assert sorted(report.resized) == sorted(grown)
    assert len(grown) == NUM_RESIZED[name]
    assert sorted(report.loaded + report.resized) == sorted(target)
    assert report.missing == report.unused == report.reinitialised == report.mapped == []
    assert report.coverage == 1
    with torch.inference_mode():
        assert torch.isfinite(model.eval()(torch.randn(1, 3, size, size))).all()


@pytest.mark.parametrize(
    ("change", "missing", "unused", "reinitialised"),
    [
        (lambda weights: weights, [], [], []),
        (
            lambda weights: {name.replace("head.", "fc."): value for name, value in weights.items()},
            ["head.bias", "head.weight"],
            ["fc.bias", "fc.weight"],
            [],
        ),
        (
            lambda weights: {name: value for name, value in weights.items() if not name.startswith("head.")},
            ["head.bias", "head.weight"],
            [],
            [],
        ),
        (
            lambda weights: weights | {"head.weight": torch.zeros(9, 16), "head.bias": torch.zeros(9)},
            [],
            [],
            ["head.bias", "head.weight"],
        ),
    ],
    ids=["same head", "renamed head", "no head", "another number of classes"],
)
def test_the_load_report_is_exact_for_every_kind_of_head(tmp_path, change, missing, unused, reinitialised):
    torch.save(change(toy().state_dict()), tmp_path / "file.pth")
    report = load_weights(toy(), tmp_path / "file.pth")
    assert (sorted(report.missing), sorted(report.unused), sorted(report.reinitialised)) == (missing, unused, reinitialised)
    assert sorted(report.loaded + report.missing + report.reinitialised) == sorted(toy().state_dict())


def test_rows_of_an_imagenet_22k_head_are_selected_for_the_1000_classes_of_imagenet(tmp_path):
    """All values of row r of the head in the file are r, so the loaded values show which row each class came from."""
    source = toy(num_classes=21841).state_dict()
    source["head.weight"] = torch.arange(21841.0).unsqueeze(1).expand(-1, 16).contiguous()
    source["head.bias"] = torch.arange(21841.0)
    torch.save({"model": source}, tmp_path / "22k.pth")
    model = toy(num_classes=1000)
    report = load_weights(model, tmp_path / "22k.pth")
    assert sorted(report.mapped) == ["head.bias", "head.weight"]
    assert report.head == (21841, 1000)
    assert report.reinitialised == ["head.weight (new rows: 1)", "head.bias (new rows: 1)"]
    # One row of the head, with 16 weights and a bias, is not loaded.
    assert report.coverage == pytest.approx(1 - 17 / sum(p.numel() for p in model.state_dict().values()))
    names_22k, names_1k = (ImageNetInfo(name).label_names() for name in ("imagenet-22k", "imagenet-1k"))
    rows = model.head.bias.tolist()
    assert [names_22k[int(row)] for row in rows if row > 0] == [name for name in names_1k if name in set(names_22k)]
    assert rows.count(0) == 1  # the class that ImageNet-22k does not contain keeps its initial bias
    assert torch.equal(model.head.weight[:, 0][model.head.bias > 0], model.head.bias[model.head.bias > 0])
    assert load_weights(toy(num_classes=10), tmp_path / "22k.pth").reinitialised == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("source", "target"),
    [("flatten_swin_s", "flatten_swin_t"), ("flatten_swin_t", "flatten_swin_s"), ("flatten_pvt_v2_b1", "flatten_deit_t")],
)
def test_a_rejection_error_suggests_the_most_similar_model(source, target, tmp_path):
    torch.save({"model": create_model(source).state_dict()}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=f"most similar to those of {source}"):
        load_weights(create_model(target), tmp_path / "file.pth")


def test_a_file_damaged_while_it_is_written_never_replaces_a_checkpoint(saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(torch, "save", lambda state, file: file.write(b"garbage"))
    with pytest.raises(CheckpointError, match="checkpoint not written; existing checkpoints are untouched"):
        save_checkpoint({"model": {}}, saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_ddp_and_compile_are_removed_from_parameter_names(prefix):
    state = {"model": {f"{prefix}head.weight": torch.ones(2), f"{prefix}module_list.0.weight": torch.ones(3)}}
    assert set(stored_weights(state)["raw"]) == {"head.weight", "module_list.0.weight"}


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", "encoder.model."])
def test_weights_behind_a_common_prefix_are_loaded_and_the_report_names_the_prefix(tmp_path, prefix):
    source, target = toy(), toy()
    for parameter in target.parameters():
        torch.nn.init.zeros_(parameter)
    state = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": state | {"criterion.weight": torch.ones(10_000_000)}}, tmp_path / "lightning.ckpt")
    report = load_weights(target, tmp_path / "lightning.ckpt")
    assert (report.prefix, report.missing, report.unused, report.coverage) == (prefix, [], ["criterion.weight"], 1)
    assert f"prefix '{prefix}'" in str(report)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


def test_weights_behind_two_prefixes_are_rejected_and_the_error_names_them(tmp_path):
    state = {f"{prefix}.net.{name}": value for prefix in ("student", "teacher") for name, value in toy().state_dict().items()}
    torch.save(state, tmp_path / "pair.pth")
    with pytest.raises(CheckpointError, match=r"several prefixes \('student\.net\.', 'teacher\.net\.'\)"):
        load_weights(toy(), tmp_path / "pair.pth")


def test_names_of_wrappers_are_removed_anywhere_in_a_name(tmp_path):
    wrappers = ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."]
    state = {}
    for index, (name, value) in enumerate(toy().state_dict().items()):
        parts, wrapper = name.split("."), wrappers[index % 4]
        inner = index % len(parts)
        state["_orig_mod.module." + ".".join([*parts[:inner], wrapper + parts[inner], *parts[inner + 1 :]])] = value
    torch.save({"model": state}, tmp_path / "wrapped.pth")
    report = load_weights(toy(), tmp_path / "wrapped.pth")
    assert (report.missing, report.unused, report.prefix, report.coverage) == ([], [], "", 1)


@pytest.mark.parametrize("attributes", [{"get": "text"}, {"_metadata": [1]}, {"_metadata": {"": 3}}], ids=str)
def test_attributes_of_a_stored_dictionary_that_would_break_its_use_are_rejected(tmp_path, attributes):
    state = toy().state_dict()
    vars(state).update(attributes)
    torch.save({"model": state}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd\.pth is not a valid checkpoint: model has"):
        read_checkpoint(tmp_path / "odd.pth")
