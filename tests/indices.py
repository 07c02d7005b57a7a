"""The images of one split, listed in a given layout."""

from pathlib import Path

from data.index import Index
from data.sources import index_split


def index_folder(path: Path, **options) -> Index:
    return index_split("folder", path.parent, path.name, **options)


def index_tar(root: Path, split: str, **options) -> Index:
    return index_split("tar", root, split, **options)


def index_zip(root: Path, split: str, **options) -> Index:
    return index_split("zip", root, split, **options)


def index_parquet(root: Path, split: str, **options) -> Index:
    return index_split("parquet", root, split, **options)
