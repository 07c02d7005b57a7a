"""Odd data sets (row D12 of docs/reliability.md).

Every image is grey, with a brightness that identifies it. A generator writes a data set in one of the layouts, changes it in a
random way, and states what must happen: every image is counted once with its class, or the data set is refused with a message
that contains a given text, or a warning does. The expectation does not come from the project's functions.
"""

import copy
import io
import json
import logging
import os
import random
import shutil
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.index
from data.build import build_datasets
from data.datasets import ImageDataset
from data.decoding import decode_pixels
from data.files import DataError
from data.index import Index, compare_descriptions, describe_index
from data.samplers import TrainBatches
from jobs.predict import find_images
from tests.indices import index_folder, index_tar, index_zip
from tests.launch import run_main
from tests.runs import toy_arguments
from utils.config.loading import load_config

pytestmark = [pytest.mark.reliability, pytest.mark.filterwarnings("ignore:Duplicate name")]
COMPOSED, DECOMPOSED = "\N{LATIN SMALL LETTER E WITH ACUTE}", "e\N{COMBINING ACUTE ACCENT}"


# --- Images


def encode(pixels: np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff_of_12_bits(pixels: np.ndarray) -> bytes:
    """A grey TIFF file of 12 bits per sample; ``pixels`` has an even number of columns."""
    packed = b"".join((int(a) << 12 | int(b)).to_bytes(3, "big") for a, b in pixels.reshape(-1, 2))
    height, width = pixels.shape
    offset = 8 + len(packed) + len(packed) % 2
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, len(packed))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", offset) + packed + bytes(len(packed) % 2) + directory + bytes(4)


def create_image(brightness: int, rng: random.Random) -> tuple[bytes, str]:
    """An image file in a random format and shape, whose pixels all decode to ``brightness``, and an extension for it."""
    height, width = rng.choice([(6, 8), (8, 6), (1, 2), (1, 400), (400, 2), (30, 30)])
    grey = np.full((height, width), brightness, np.uint8)
    low_bits = np.random.default_rng(brightness).integers(0, 16, grey.shape)
    content, extension = rng.choice(
        [
            lambda: (encode(np.stack([grey] * 3, axis=2), "PNG"), ".png"),
            lambda: (encode(grey, "PNG"), ".PNG"),
            lambda: (encode(grey, "BMP"), ".bmp"),
            lambda: (encode(grey, "PPM"), ".pgm"),
            lambda: (encode(grey, "TIFF"), ".tif"),
            lambda: (encode((grey.astype(np.uint16) << 8) + low_bits.astype(np.uint16), "PNG"), ".png"),
            lambda: (tiff_of_12_bits((grey.astype(np.int64) << 4) + low_bits), ".TIFF"),
            lambda: (encode(np.stack([grey] * 3, axis=2), "WEBP", lossless=True), ".webp"),
            lambda: (encode(grey, "GIF"), ".jpg"),  # the content decides, not the extension
        ]
    )()
    return content, extension


# --- Data sets


@dataclass
class Draw:
    """A data set and what must happen to it.

    Args:
        root: directory of the data set.
        classes: class names by class id.
        files: content of each image by (class id, name of the file without directories).
        refused: text that the error must contain; "" if the data set must be accepted.
        warned: texts that the warnings must contain; if there are none, there must be no warning.
        expected: brightness and class name of every image that must be counted.
    """

    root: Path
    rng: random.Random
    layout: str
    classes: list[str] = field(default_factory=list)
    files: dict[tuple[int, str], bytes] = field(default_factory=dict)
    refused: str = ""
    warned: list[str] = field(default_factory=list)
    expected: Counter = field(default_factory=Counter)
    brightness: int = 20

    def add(self, label: int, name: str = "", *, expected: bool = True) -> str:
        """Add an image. Returns the name of its file."""
        self.brightness += 1
        content, extension = create_image(self.brightness, self.rng)
        name = name or f"{self.brightness}{extension}"
        self.files[label, name] = content
        if expected:
            self.expected[self.brightness, self.classes[label]] += 1
        return name

    def folder(self, label: int) -> Path:
        return self.root / "val" / self.classes[label]

    def path(self, key: tuple[int, str]) -> Path:
        return self.folder(key[0]) / key[1]


def create_draw(root: Path, rng: random.Random, layout: str) -> Draw:
    names = rng.choice([["cat", "dog"], ["a b", "c.d", f"caf{COMPOSED}"], ["Zebra", "ant", "0"], [str(n) for n in range(12)]])
    draw = Draw(root, rng, layout, sorted(names))
    for label in range(len(names)):
        for _ in range(rng.randrange(2, 5)):
            draw.add(label)
    return draw


def write_folder(draw: Draw) -> None:
    for (label, name), content in draw.files.items():
        (draw.folder(label) / name).parent.mkdir(parents=True, exist_ok=True)
        (draw.folder(label) / name).write_bytes(content)


def write_zip(draw: Draw, change: Callable[[zipfile.ZipFile, list[str]], None] = lambda archive, lines: None) -> None:
    """Write ``val.zip`` and its map file, after ``change(archive, lines of the map file)``."""
    draw.root.mkdir(exist_ok=True)
    lines = [f"{label}/{name}\t{label}" for label, name in draw.files]
    with zipfile.ZipFile(draw.root / "val.zip", "w", draw.rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for (label, name), content in draw.files.items():
            archive.writestr(f"{label}/{name}", content)
        change(archive, lines)
    (draw.root / "val_map.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (draw.root / "classes.txt").write_text("".join(f"{name}\n" for name in draw.classes), encoding="utf-8")


def member(name: str, content: bytes, **attributes) -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for key, value in attributes.items():
        setattr(entry, key, value)
    return entry, content


def tar_members(draw: Draw) -> list[list[tuple[tarfile.TarInfo, bytes]]]:
    """Members of two shards."""
    shards: list[list[tuple[tarfile.TarInfo, bytes]]] = [[], []]
    for number, ((label, name), content) in enumerate(draw.files.items()):
        stem, _, extension = name.rpartition(".")
        shards[number % 2] += [member(f"{label}_{stem}.{extension}", content), member(f"{label}_{stem}.cls", b"%d\n" % label)]
    return shards


def write_tar(
    draw: Draw, shards: list[list[tuple[tarfile.TarInfo, bytes]]], names: tuple[str, ...] = ("val-0.tar", "val-1.tar")
):
    draw.root.mkdir(exist_ok=True)
    for name, members in zip(names, shards, strict=True):
        kind = draw.rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
        with tarfile.open(draw.root / name, "w", format=kind) as archive:
            for entry, content in members:
                archive.addfile(entry, io.BytesIO(content))
    (draw.root / "classes.txt").write_text("".join(f"{name}\n" for name in draw.classes), encoding="utf-8")


# --- Changes of directories. Each writes the data set and sets what must happen.


def folder_plain(draw: Draw) -> None:
    write_folder(draw)


def folder_nested(draw: Draw) -> None:
    draw.add(0, "deep/er/x.png")
    write_folder(draw)


def folder_nested_class_name(draw: Draw) -> None:
    draw.add(0, f"{draw.classes[1]}/x.png")
    draw.warned = [f"{draw.classes[0]}/{draw.classes[1]} has the name of a class"]
    write_folder(draw)


def folder_link_to_image(draw: Draw) -> None:
    write_folder(draw)
    target, other = draw.rng.choice(list(draw.files)), draw.rng.randrange(len(draw.classes))
    link = draw.folder(other) / "link.png"
    draw.rng.choice([lambda: link.symlink_to(draw.path(target)), lambda: os.link(draw.path(target), link)])()
    draw.refused = draw.rng.choice(["link.png", target[1]])


def folder_link_to_class(draw: Draw) -> None:
    write_folder(draw)
    place = draw.rng.choice([draw.folder(0) / "link", draw.root / "val" / "link"])
    place.symlink_to(draw.folder(1))
    draw.refused = "link"


def folder_link_to_parent(draw: Draw) -> None:
    write_folder(draw)
    (draw.folder(1) / "loop").symlink_to(draw.rng.choice([draw.folder(1), draw.root / "val"]))
    draw.warned = ["links to a directory that contains them: 1"]


def folder_strays(draw: Draw) -> None:
    write_folder(draw)
    for number in range(count := draw.rng.randrange(1, 4)):
        (draw.root / "val" / f"stray{number}.jpg").write_bytes(draw.files[next(iter(draw.files))])
    draw.warned = [f"lie beside the class directories: {count}"]


def folder_empty_class(draw: Draw) -> None:
    write_folder(draw)
    (draw.root / "val/empty/nested").mkdir(parents=True)
    if draw.rng.random() < 0.5:
        (draw.root / "val/empty/a.jxl").write_bytes(b"\xff\x0a")
    draw.refused = "val/empty has no images"


def folder_other_formats(draw: Draw) -> None:
    extension = draw.rng.choice([".jxl", ".jp2", ".NEF", ".cr2", ".exr", ".psd"])
    write_folder(draw)
    for number in range(count := draw.rng.randrange(1, 30)):
        (draw.folder(number % 2) / f"{number}{extension}").write_bytes(b"x")
    draw.warned = [f"{count} {extension.lower()}"]


def folder_images_by_content(draw: Draw) -> None:
    extension = draw.rng.choice(["", ".dat", ".download", ".bak"])
    write_folder(draw)
    contents = [encode(np.zeros((2, 2, 3), np.uint8), kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")]
    for number, content in enumerate(contents):
        (draw.folder(0) / f"{number}{extension}").write_bytes(content)
    if extension in (".download", ".bak"):  # incomplete files and copies
        draw.warned = [f"7 {extension}"]
    else:
        draw.expected[0, draw.classes[0]] += 6
        draw.warned = [f"1 {extension or 'without extension'}, such as {draw.classes[0]}/6"]  # a text may start like a PPM file


def folder_other_files(draw: Draw) -> None:
    write_folder(draw)
    (draw.root / "val" / "README").write_text("text")
    (draw.folder(0) / "labels.csv").write_text("a,b")
    (draw.folder(0) / "BMW").write_text("BMW cars")


def folder_hidden(draw: Draw) -> None:
    write_folder(draw)
    content = draw.files[next(iter(draw.files))]
    name = draw.rng.choice(["hidden.png", "folder"])
    if name == "folder":
        (draw.folder(0) / ".folder").mkdir()
        (draw.folder(0) / ".folder/x.png").write_bytes(content)
    else:
        (draw.folder(0) / f".{name}").write_bytes(content)
    draw.warned = [f"are hidden: 1, such as {draw.classes[0]}/.{name}"]


def folder_system_files(draw: Draw) -> None:
    write_folder(draw)
    content = draw.files[next(iter(draw.files))]
    for name in (
        "@eaDir/x.jpg/SYNO_THUMB.jpg",
        "#recycle/y.jpg",
        "$RECYCLE.BIN/z.png",
        ".ipynb_checkpoints/w.png",
        "__MACOSX/v.png",
    ):
        parent = draw.rng.choice([draw.folder(0), draw.root / "val"])
        (parent / name).parent.mkdir(parents=True)
        (parent / name).write_bytes(content)
    for name in ("._1.png", "Thumbs.db", ".DS_Store", "desktop.ini"):
        (draw.folder(1) / name).write_bytes(content)


def folder_equal_but_for_case(draw: Draw) -> None:
    draw.add(0, "same.png")
    draw.add(0, "same.PNG")
    draw.add(0, "SAME.png")
    write_folder(draw)


def folder_classes_equal_but_for_case(draw: Draw) -> None:
    draw.classes = ["Cat", "cat"]
    draw.files.clear()
    draw.expected.clear()
    for label in (0, 0, 1):
        draw.add(label)
    draw.warned = ["Cat and cat differ only in upper and lower case"]
    write_folder(draw)


def folder_normalisation_twins(draw: Draw) -> None:
    draw.add(0, f"{COMPOSED}.png")
    draw.add(0, f"{DECOMPOSED}.png")
    write_folder(draw)
    if draw.rng.random() < 0.7:
        for name in (COMPOSED, DECOMPOSED):
            (draw.root / "val" / name).mkdir()
            (draw.root / "val" / name / "x.png").write_bytes(draw.files[0, f"{COMPOSED}.png"])
        draw.refused = "differ only in Unicode normalisation"


def folder_beside_shards(draw: Draw) -> None:
    write_folder(draw)
    write_tar(draw, tar_members(draw))
    draw.warned = ["not the tar shards beside it, such as"]


# --- Changes of zip archives


def zip_plain(draw: Draw) -> None:
    write_zip(draw)


def zip_listed_twice(draw: Draw) -> None:
    def change(archive, lines):
        name, label = draw.rng.choice(lines).split("\t")
        lines.append(f"{name}\t{draw.rng.choice([label, '0'])}")
        draw.refused = f"val_map.txt:{len(lines)}: {name}"

    write_zip(draw, change)


def zip_two_entries_of_a_name(draw: Draw) -> None:
    def change(archive, lines):
        name = draw.rng.choice(lines).split("\t")[0]
        archive.writestr(name, b"other")
        draw.refused = f"several entries named {name}"

    write_zip(draw, change)


def zip_two_names_of_an_entry(draw: Draw) -> None:
    """Two entries of the central directory point to the same data."""

    def change(archive, lines):
        entry = copy.copy(draw.rng.choice(archive.filelist))
        entry.filename = "copy.png"
        archive.filelist.append(entry)
        archive.NameToInfo["copy.png"] = entry
        lines.append("copy.png\t0")
        draw.refused = "copy.png"

    write_zip(draw, change)


def zip_unlisted(draw: Draw) -> None:
    def change(archive, lines):
        for number in range(count := draw.rng.randrange(1, 4)):
            archive.writestr(f"extra{number}.JPG", b"x")
        archive.writestr("y.jxl", b"x")
        archive.writestr("README", b"x")
        draw.warned = [f"are not listed in val_map.txt: {count}, such as extra0.JPG", "1 .jxl"]

    write_zip(draw, change)


def zip_system_files(draw: Draw) -> None:
    write_zip(
        draw, lambda archive, lines: [archive.writestr(n, b"x") for n in ("__MACOSX/0/._1.png", "0/Thumbs.db", "0/._1.jpg")]
    )


def zip_missing_image(draw: Draw) -> None:
    draw.refused = "gone.png"
    write_zip(draw, lambda archive, lines: lines.append("gone.png\t0"))


def zip_class_gap(draw: Draw) -> None:
    draw.refused = f"no image of class {len(draw.classes)}"

    def change(archive, lines):
        archive.writestr("far.png", b"x")
        lines.append(f"far.png\t{len(draw.classes) + 1}")

    write_zip(draw, change)


# --- Changes of tar shards


def tar_plain(draw: Draw) -> None:
    write_tar(draw, tar_members(draw))


def tar_restarting_keys(draw: Draw) -> None:
    """Keys may start again in every shard, as each process that packs images counts from 0."""
    shards = tar_members(draw)
    for members in shards:
        for number, (entry, _) in enumerate(members):
            entry.name = f"{number // 2}.{entry.name.rpartition('.')[2]}"
    write_tar(draw, shards)


def tar_member_twice(draw: Draw) -> None:
    shards = tar_members(draw)
    entry, content = draw.rng.choice([pair for pair in shards[0] if not pair[0].name.endswith(".cls")])
    name = draw.rng.choice([entry.name, f"./{entry.name}", entry.name.upper() if entry.name[0].isdigit() else entry.name])
    shards[0].append(member(name, content))
    stem = entry.name.rpartition(".")[0]
    draw.refused = stem
    write_tar(draw, shards)


def tar_class_id_twice(draw: Draw) -> None:
    shards = tar_members(draw)
    entry, content = draw.rng.choice([pair for pair in shards[1] if pair[0].name.endswith(".cls")])
    other = int(content) if draw.rng.random() < 0.5 else int(content) + 1
    shards[1].append(member(f"./{entry.name}", b"%d" % other))
    draw.refused = f"{entry.name} occurs twice" if other != int(content) else ""
    write_tar(draw, shards)


def tar_copied_shard(draw: Draw) -> None:
    write_tar(draw, tar_members(draw))
    copied = draw.root / draw.rng.choice(["val-2.tar", "val-extra.tar"])
    draw.rng.choice(
        [lambda: shutil.copy(draw.root / "val-1.tar", copied), lambda: copied.symlink_to(draw.root / "val-1.tar")]
    )()
    draw.refused = copied.name


def tar_missing_shard(draw: Draw) -> None:
    names, missing = draw.rng.choice(
        [
            (("val-0.tar", "val-2.tar"), "val-1.tar"),
            (("val-000001.tar", "val-000003.tar"), "shard 2"),
            (("val-3.tar", "val-4.tar"), "shard 0"),
            (("val-0-of-3.tar", "val-1-of-3.tar"), "shard 2"),
            (("val-00001-of-00003.tar", "val-00003-of-00003.tar"), "shard 2"),
        ]
    )
    draw.refused = missing
    write_tar(draw, tar_members(draw), names)


def tar_numbered_from_1(draw: Draw) -> None:
    names = draw.rng.choice(
        [("val-0001.tar", "val-0002.tar"), ("val-1-of-2.tar", "val-2-of-2.tar"), ("val-a.tar", "val-c.tar")]
    )
    write_tar(draw, tar_members(draw), names)


def tar_same_number(draw: Draw) -> None:
    draw.refused = "have the same number"
    write_tar(draw, tar_members(draw), ("val-1.tar", "val-01.tar"))


def tar_other_members(draw: Draw) -> None:
    shards = tar_members(draw)
    long_name = "x" * 150 + "/y.json"
    shards[0] += [member("a.json", b"{}"), member(long_name, b"{}"), member("._b.png", b"x"), member("@eaDir/c.jpg", b"x")]
    shards[1].append(member("folder", b"", type=tarfile.DIRTYPE))
    write_tar(draw, shards)


def tar_long_names(draw: Draw) -> None:
    shards = tar_members(draw)
    for members in shards:
        for entry, _ in members:
            entry.name = f"{'d' * 120}/{COMPOSED * 60}/{entry.name}"
    write_tar(draw, shards)


def tar_other_formats(draw: Draw) -> None:
    shards = tar_members(draw)
    shards[0].append(member("z.jxl", b"\xff\x0a"))
    if draw.rng.random() < 0.5:
        shards[0].append(member("z.cls", b"0"))
        draw.refused = "z.cls has no image"
    else:
        draw.warned = ["1 .jxl"]
    write_tar(draw, shards)


def tar_hard_link(draw: Draw) -> None:
    shards = tar_members(draw)
    kind = draw.rng.choice([tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, b"M", b"V"])
    shards[0].append(member("link.png", b"", type=kind, linkname=shards[0][0][0].name))
    draw.refused = "link.png"
    write_tar(draw, shards)


def tar_sparse(draw: Draw) -> None:
    shards = tar_members(draw)
    records, content = draw.rng.choice(
        [
            (
                {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "4096"},
                b"1\n0\n3\n".ljust(512, b"\0") + b"abc",
            ),
            (
                {"GNU.sparse.size": "4096", "GNU.sparse.numblocks": "1", "GNU.sparse.offset": "0", "GNU.sparse.numbytes": "3"},
                b"abc",
            ),
            ({"GNU.sparse.map": "0,3", "GNU.sparse.size": "4096"}, b"abc"),
            ({"SCHILY.realsize": "4096"}, b"abc"),
        ]
    )
    shards[0].insert(2, member("holes.png", content, pax_headers=records))
    shards[0].append(member("holes.cls", b"0"))
    draw.refused = "holes.png is stored as a sparse file"
    draw.rng.choice = lambda _: tarfile.PAX_FORMAT  # type: ignore[method-assign]
    write_tar(draw, shards)


def tar_sparse_in_gnu_format(draw: Draw) -> None:
    """``tar -S`` without ``--format posix``: a list of (offset, length) of the data in the header."""
    shards = tar_members(draw)
    entry, content = member("holes.png", b"abc")
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"%011o\0%011o\0" % (4093, 3)
    header[483:495] = b"%011o\0" % 4096
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    draw.refused = "holes.png is stored as a sparse file"
    write_tar(draw, shards)
    path = draw.root / "val-0.tar"
    path.write_bytes(bytes(header) + content.ljust(512, b"\0") + path.read_bytes())


def tar_size_records(draw: Draw) -> None:
    """Sizes as pax records or in base 256; tarfile writes neither for small files."""
    shards = tar_members(draw)
    draw.root.mkdir(exist_ok=True)
    blocks = [b"", b""]
    for number, members in enumerate(shards):
        for entry, content in members:
            header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
            if draw.rng.random() < 0.5:
                header[124:136] = b"\x80" + len(content).to_bytes(11, "big")
            else:
                record = b"%d size=%d\n" % (9 + len(str(len(content))) + 0, len(content))
                record = b"%d size=%d\n" % (len(record), len(content))
                extended = tarfile.TarInfo("PaxHeader")
                extended.type, extended.size = tarfile.XHDTYPE, len(record)
                blocks[number] += extended.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
                header[124:136] = b"%011o\0" % 0
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            blocks[number] += bytes(header) + content + bytes(-len(content) % 512)
        (draw.root / f"val-{number}.tar").write_bytes(blocks[number] + bytes(1024))
    (draw.root / "classes.txt").write_text("".join(f"{name}\n" for name in draw.classes), encoding="utf-8")


def tar_compressed_beside(draw: Draw) -> None:
    write_tar(draw, tar_members(draw))
    (draw.root / "val-2.tar.gz").write_bytes(b"x")
    draw.warned = ["val-2.tar.gz is not read"]


def tar_misnamed_beside(draw: Draw) -> None:
    names = [f"val-{number}.tar" for number in range(2)]
    write_tar(draw, tar_members(draw))
    other = draw.rng.choice(["val_2.tar", "val-2.TAR", "VAL-2.tar", "val2.tar", "val.tar", "val.tgz"])
    (draw.root / other).write_bytes((draw.root / draw.rng.choice(names)).read_bytes())
    draw.warned = [f"{other} is not read"]


CHANGES = {
    name: value
    for name, value in list(globals().items())
    if name.startswith(("folder_", "zip_", "tar_")) and name != "tar_members"
}


def check(draw: Draw, tmp_config: Path, caplog) -> None:
    """Read a data set through ``build_datasets``, and compare what happens with the expectation."""
    caplog.clear()
    options = ["DATA.DATA_PATH", str(draw.root), "MODEL.NUM_CLASSES", len(draw.classes), "DATA.ZIP_MODE", draw.layout == "zip"]
    cfg = load_config(tmp_config, options)

    def read() -> ImageDataset:
        return build_datasets(cfg, training=False, model_classes=draw.classes).val

    if draw.refused:
        with pytest.raises(DataError) as caught:
            read()
        assert draw.refused in str(caught.value)
        return
    dataset = read()
    counted: Counter = Counter()
    for position in range(len(dataset)):
        pixels, content = np.asarray(dataset.decode(position)), dataset.read(position)
        assert pixels.min() == pixels.max()
        assert torch.equal(torch.from_numpy(pixels.copy()).permute(2, 0, 1), decode_pixels(content))
        assert dataset.transform(dataset.decode(position)).unique().tolist() == [pixels.min()]
        counted[int(pixels.min()), dataset.index.classes[dataset.index.labels[position]]] += 1
    assert counted == draw.expected
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert all(any(text in warning for warning in warnings) for text in draw.warned), warnings
    assert bool(warnings) == bool(draw.warned), warnings
    if draw.layout == "folder":
        assert len(find_images([draw.root / "val" / name for name in draw.classes])) == draw.expected.total()


def run_draw(name: str, seed: int, root: Path, config: Path, caplog) -> None:
    draw = create_draw(root, random.Random(f"{name} {seed}"), name.partition("_")[0])
    CHANGES[name](draw)
    check(draw, config, caplog)
    shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize("name", CHANGES)
def test_d12_every_image_is_counted_once_or_the_data_are_refused_or_a_warning_names_it(name, toy_config, tmp_path, caplog):
    run_draw(name, 0, tmp_path / "data", toy_config, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("name", CHANGES)
def test_d12_of_random_odd_data(name, seed, toy_config, tmp_path, caplog):
    run_draw(name, seed, tmp_path / "data", toy_config, caplog)


# --- Whole runs


def test_d12_a_run_on_odd_data_trains_on_and_evaluates_every_image_once(toy_config, tmp_path):
    rng = random.Random(2)
    for split, count in (("train", 30), ("val", 9)):
        draw = Draw(tmp_path / split, rng, "folder", ["a", "b", f"caf{COMPOSED}"])
        for number in range(count):
            draw.add(number % 3, "nested/x.png" if number == 4 else "")
        write_folder(draw)
        (draw.root / "val").rename(tmp_path / "data" if split == "none" else tmp_path / f"{split} images")
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split} images").rename(tmp_path / "data" / split)
    (tmp_path / "data/val/a/left out.jxl").write_bytes(b"\xff\x0a")
    options = ["TRAIN.EPOCHS", 1, "DATA.BATCH_SIZE", 5, "DATA.NUM_WORKERS", 2, "TEST.CROP_MODE", "short"]
    outcome = run_main(toy_arguments(toy_config, tmp_path / "data", tmp_path, *options), tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert "images used per epoch: 30 of 30" in outcome.output
    assert "WARNING" in outcome.output
    assert "1 .jxl" in outcome.output
    arguments = ["--eval", "--resume", tmp_path / "toy/default", "--data-path", tmp_path / "data"]
    outcome = run_main(arguments, tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    results = json.loads((tmp_path / "toy/default/eval.json").read_text())["results"]
    assert [result["num_images"] for result in results.values()] == [9, 9]


@pytest.mark.parametrize("kind", ["linked split", "linked class", "copied split", "different"])
def test_d12_a_warning_names_validation_images_that_are_training_images(kind, toy_config, tmp_path, caplog):
    draw = Draw(tmp_path, random.Random(kind), "folder", ["a", "b"])
    for number in range(8):
        draw.add(number % 2)
    write_folder(draw)
    val, train = tmp_path / "val", tmp_path / "train"
    if kind == "linked split":
        train.symlink_to(val)
    else:
        shutil.copytree(val, train)
    if kind == "linked class":
        shutil.rmtree(train / "b")
        (train / "b").symlink_to(val / "b")
        (train / "a" / "more.png").write_bytes(draw.files[0, next(name for label, name in draw.files if label == 0)])
    if kind == "different":
        next((train / "a").iterdir()).write_bytes(create_image(200, draw.rng)[0])
    build_datasets(load_config(toy_config, ["DATA.DATA_PATH", str(tmp_path), "MODEL.NUM_CLASSES", 2]), training=True)
    assert ("have the same images" in caplog.text) == (kind != "different")


# --- Changed data


def bitmap(value: int) -> bytes:
    """Files of equal size for any value."""
    return encode(np.full((8, 8, 3), value, np.uint8), "BMP")


def write_split(root: Path, layout: str, values: dict[tuple[str, str], int]) -> Index:
    """Write the image of each (class, name) as the split train, and index it."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    classes = sorted({name for name, _ in values})
    if layout == "folder":
        for (class_name, name), value in values.items():
            (root / "train" / class_name).mkdir(parents=True, exist_ok=True)
            (root / "train" / class_name / name).write_bytes(bitmap(value))
        return index_folder(root / "train")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    if layout == "zip":
        with zipfile.ZipFile(root / "train.zip", "w") as archive:
            for (class_name, name), value in values.items():
                archive.writestr(f"{class_name}/{name}", bitmap(value))
        lines = (f"{class_name}/{name}\t{classes.index(class_name)}\n" for class_name, name in values)
        (root / "train_map.txt").write_text("".join(lines))
        return index_zip(root, "train")
    for shard, items in enumerate((list(values.items())[::2], list(values.items())[1::2])):
        with tarfile.open(root / f"train-{shard}.tar", "w") as archive:
            for (class_name, name), value in items:
                stem = name.removesuffix(".bmp")
                for entry, content in (
                    member(f"{class_name}/{name}", bitmap(value)),
                    member(f"{class_name}/{stem}.cls", b"%d" % classes.index(class_name)),
                ):
                    archive.addfile(entry, io.BytesIO(content))
    return index_tar(root, "train")


ORIGINAL = {(name, f"{number}.bmp"): 50 * label + number for label, name in enumerate(("a", "b", "c")) for number in range(12)}


@pytest.mark.parametrize("layout", ["folder", "zip", "tar"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values, ""),
        (lambda values: {key: value + 13 for key, value in values.items()}, "class a has the same number of images, but"),
        (
            lambda values: {key: values[{"a": "b", "b": "a", "c": "c"}[key[0]], key[1]] for key in values},
            "class a has the same",
        ),
        (lambda values: values | {("c", "5.bmp"): 200}, "class c has the same number of images, but"),
    ],
    ids=["copied", "all overwritten", "classes swapped", "one image replaced"],
)
def test_r17_new_contents_under_the_same_names_and_sizes_are_detected_and_copies_are_not(layout, change, message, tmp_path):
    before = describe_index(write_split(tmp_path / "data", layout, ORIGINAL))
    after = describe_index(write_split(tmp_path / "data", layout, change(ORIGINAL)))
    assert compare_descriptions(json.loads(json.dumps(before)), after).startswith(message)
    assert bool(compare_descriptions(before, after)) == bool(message)


def test_r17_a_large_split_is_sampled_and_file_sizes_are_always_compared(tmp_path, monkeypatch):
    """With one sampled image per class, an image of another size is detected, but one of the same size is not."""
    monkeypatch.setattr(data.index, "NUM_SAMPLES", 1)
    index = write_split(tmp_path / "data", "folder", ORIGINAL)
    before, path = describe_index(index), tmp_path / "data/train/b/7.bmp"
    path.write_bytes(bitmap(3))
    assert compare_descriptions(before, describe_index(index_folder(tmp_path / "data/train"))) == ""
    path.write_bytes(bitmap(3) + b"x")
    difference = compare_descriptions(before, describe_index(index_folder(tmp_path / "data/train")))
    assert difference == "class b has the same number of images, but files of other sizes or contents"
    path.write_bytes(bitmap(57))
    for name in ("a", "b", "c"):
        (tmp_path / "data/train" / name / "0.bmp").write_bytes(bitmap(201))
        assert f"class {name} has" in compare_descriptions(before, describe_index(index_folder(tmp_path / "data/train")))
        (tmp_path / "data/train" / name / "0.bmp").write_bytes(bitmap({"a": 0, "b": 50, "c": 100}[name]))


def test_descriptions_in_checkpoints_of_earlier_versions_are_compared_by_what_they_contain(tmp_path):
    """The stored digests were computed by the version of 2026-11-25."""
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "train" / name / f"{number}.bmp").write_bytes(b"BM" + bytes([number]) * 20)
    with tarfile.open(tmp_path / "val-0.tar", "w") as archive:
        for number in range(4):
            for entry, content in (
                member(f"{number}.bmp", b"BM" + bytes([number]) * (20 + number)),
                member(f"{number}.cls", b"%d" % (number % 2)),
            ):
                archive.addfile(entry, io.BytesIO(content))
    stored = {"num_images": 6, "classes": [["cat", 3, "651d7c72e274ee8e"], ["dog", 3, "45c6e3d8dc188a62"]]}
    assert compare_descriptions(stored, describe_index(index_folder(tmp_path / "train"))) == ""
    stored["classes"][1][2] = "45c6e3d8dc188a63"
    assert "class dog has the same number" in compare_descriptions(stored, describe_index(index_folder(tmp_path / "train")))
    stored = {"num_images": 4, "classes": [["0", 2, "8162032230faeb0c"], ["1", 2, "9704f3ccd3bdb55b"]]}
    assert compare_descriptions(stored, describe_index(index_tar(tmp_path, "val"))) == ""
    for malformed in ({}, {"classes": 3}, {"classes": [3]}, {"classes": [["cat"]]}, {"classes": [[[], 3, "x"]]}):
        assert "malformed" in compare_descriptions(malformed, describe_index(index_tar(tmp_path, "val")))


# --- Cached indices


@pytest.fixture
def cached_split(tmp_path, monkeypatch):
    """A split whose index is cached. Returns its directory, the cache file and a function that indexes it."""
    monkeypatch.setattr(data.index, "MIN_CACHED_IMAGES", 1)
    # Use a time in the future: the index of data that changed in the last 2 s is not cached.
    monkeypatch.setattr(data.index.time, "time_ns", lambda: 2**62)
    write_split(tmp_path / "data", "folder", ORIGINAL)
    (tmp_path / "data/train/a/left out.jxl").write_bytes(b"\xff\x0a")

    def read() -> Index:
        return index_folder(tmp_path / "data/train", cache=tmp_path / "cache")

    read()
    (path,) = (tmp_path / "cache").iterdir()
    return tmp_path / "data/train", path, read


def test_warnings_about_left_out_files_are_repeated_from_the_cache(cached_split, caplog):
    *_, read = cached_split
    caplog.set_level("INFO")
    read()
    assert "from the index cached in" in caplog.text
    assert "1 .jxl" in caplog.text


def test_a_cached_index_is_not_used_after_image_files_were_overwritten(cached_split, caplog):
    root, _, read = cached_split
    caplog.set_level("INFO")
    for path in root.glob("*/*.bmp"):
        with open(path, "ab") as file:
            file.write(b"x")
    assert read().sizes.tolist() == [len(bitmap(0)) + 1] * len(ORIGINAL)
    assert "image files have changed" in caplog.text


HEADERS = [
    lambda header: [header],
    lambda header: None,
    lambda header: {},
    *(
        lambda header, name=name, value=value: header | {name: value}
        for name in ("stamps", "classes", "archives", "notes", "format")
        for value in (None, 7, float("nan"), [[1, 2]], "text", {}, {"a": 1}, {"3": [1, 2, 3, 4]}, 10**30)
    ),
]
ARRAYS = [
    *((name, lambda array: array[:-1]) for name in ("labels", "text", "ends", "sizes")),
    *((name, lambda array: array.astype(np.float64) * np.nan) for name in ("labels", "ends", "sizes")),
    ("labels", lambda array: array + 1),
    ("labels", lambda array: array - 1),
    ("labels", lambda array: array.astype(np.int64)),
    ("labels", lambda array: array.reshape(1, -1)),
    ("labels", lambda array: array * 0),
    ("ends", lambda array: array[::-1].copy()),
    ("ends", lambda array: array + 10**12),
    ("text", lambda array: array.astype(np.int32)),
    ("sizes", lambda array: array + 1),
    ("offsets", lambda array: np.zeros(5, np.int64)),
    ("checksums", lambda array: np.zeros(5, np.uint32)),
    ("deflated", lambda array: np.zeros(3, object)),
]


def test_an_odd_index_cache_leads_to_a_new_scan(cached_split, caplog):
    _, path, read = cached_split
    caplog.set_level("INFO")
    with np.load(path, allow_pickle=False) as cached:
        arrays = dict(cached)
    header = json.loads(str(arrays["header"]))
    variants = [arrays | {"header": np.array(json.dumps(change(copy.deepcopy(header))))} for change in HEADERS]
    variants += [arrays | {name: change(arrays[name])} for name, change in ARRAYS]
    variants += [{key: value for key, value in arrays.items() if key != name} for name in arrays]
    expected = index_folder(path.parent.parent / "data/train")
    for number, variant in enumerate(variants):
        np.savez(path, **variant)
        caplog.clear()
        index = read()
        assert "scanning again" in caplog.text, number
        assert (index.classes, index.labels.tolist()) == (expected.classes, expected.labels.tolist())
    content = path.read_bytes()
    for end in range(0, len(content), 397):  # truncated
        path.write_bytes(content[:end])
        assert len(read()) == len(expected)
    np.savez_compressed(path, **arrays)
    caplog.clear()
    assert len(read()) == len(expected)
    assert "it is compressed" in caplog.text
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<i4", "fortran_order": False, "shape": (2**60,)})
    with zipfile.ZipFile(path, "w") as archive:
        for name in arrays:
            archive.writestr(f"{name}.npy", huge.getvalue())
    assert len(read()) == len(expected)


# --- Repeated augmentation


@pytest.mark.parametrize(("world_size", "batch_size", "repeats"), [(3, 4, 3), (2, 6, 3), (4, 8, 4), (1, 6, 2)])
def test_copies_of_an_image_are_in_different_batches_if_there_are_enough_processes(world_size, batch_size, repeats):
    """Every batch has as many distinct images as possible: with at least as many processes as copies, no image twice."""
    for rank in range(world_size):
        batches = TrainBatches(97, batch_size, accumulation=1, repeats=repeats, rank=rank, world_size=world_size, seed=1)
        for batch in batches:
            images = Counter(index for _, index in batch)
            most = 1 if world_size >= repeats else -(-repeats // world_size)
            assert max(images.values()) <= most
            assert len(batch) == batch_size
