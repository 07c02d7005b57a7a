"""Writes parquet shards as the library ``datasets`` does, with the metadata that contain the class names."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

Row = tuple[bytes | None, str | None, int | None]  # bytes of the image, name of its file, class id


def write_parquet(
    path: Path,
    rows: Sequence[Row],
    classes: Sequence[str] | None = None,
    *,
    image: str = "image",
    label: str = "label",
    group_size: int = 10,
    **options,
) -> Path:
    """Write a shard. The test is skipped without pyarrow.

    Args:
        classes: class names; None writes no metadata.
        image, label: names of the columns.
        options: further arguments of ``pyarrow.parquet.write_table``.
    """
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    images = [None if data is None and name is None else {"bytes": data, "path": name} for data, name, _ in rows]
    columns = {
        "id": pa.array([f"row {number}" for number in range(len(rows))]),
        image: pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        label: pa.array([number for *_, number in rows], pa.int64()),
    }
    features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": list(classes or ())}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if classes is not None else None
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, path, row_group_size=group_size, **options)
    return path


def write_parquet_copy(source: Path, target: Path, names: dict[str, str] | None = None) -> Path:
    """Write a data set ``source/<split>/<class>/<image>`` as the hub's parquet shards, two per split, in the same order.

    Args:
        names: name of each split in the shards; by default those of the hub.
    """
    for split, name in (names or {"train": "train", "val": "validation"}).items():
        folders = sorted(path for path in (source / split).iterdir() if path.is_dir())
        rows: list[Row] = [
            (path.read_bytes(), path.name, label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())
        ]
        for shard, start in enumerate((0, len(rows) // 2)):
            part = rows[start : start + len(rows) // 2] if shard == 0 else rows[start:]
            write_parquet(target / f"data/{name}-0000{shard}-of-00002.parquet", part, [folder.name for folder in folders])
    return target
