"""Download weight files once, into the cache of torch.hub."""

import base64
import glob
import hashlib
import http.client
import logging
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit, urlunsplit

import torch
from tqdm import tqdm

from .reader import CheckpointError, read_checkpoint, sha256

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 30.0  # for opening the connection, and for each read
SECONDS_BETWEEN_LOG_LINES = 30.0  # between progress lines in the log
MAX_STEM = 100  # characters of a URL's last part in the name of the cached file
_BLOCK = 1 << 20  # bytes
# First bytes of the accepted formats: zip (torch.save), pickle (torch.save before 1.6), safetensors (length and JSON header).
_SIGNATURES = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]|.{8}\{", re.DOTALL)
_TAR_MAGIC = (b"ustar", 257)  # tar format of early torch.save versions: magic bytes and their offset


def cache_folder() -> Path:
    """Directory of downloaded weight files: ``checkpoints`` in the cache of torch.hub (TORCH_HOME)."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def cached_path(url: str, name: str = "") -> Path:
    """Path of a URL's file in the cache.

    Args:
        name: file name without suffix; derived from the URL by default.

    Raises:
        ValueError: the URL is malformed.
    """
    parts = urlsplit(url)
    last = Path(parts.path).name
    suffix = Path(last).suffix if Path(last).suffix in (".pth", ".pt", ".safetensors", ".tar", ".bin") else ".pth"
    if not name:
        stem = re.sub(r"[^\w.-]", "_", last.removesuffix(suffix))[:MAX_STEM] or parts.hostname or "weights"
        # Two URLs may end in the same name, and query strings may select different files.
        identity = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))
        name = f"{stem}-{hashlib.sha256(identity.encode(errors='surrogatepass')).hexdigest()[:8]}"
    return cache_folder() / f"{name}{suffix}"


def fetch(url: str, name: str = "") -> Path:
    """Download a URL's file unless it is cached, and return its path.

    The download is written to a temporary file and renamed when complete; an interrupted download starts again from the
    beginning. The sha256 is recorded next to the file and checked at every later call. If several processes call this
    function, one downloads and the others wait.

    Args:
        url: http or https, possibly with a user name and a password; messages and logs do not contain its secrets.
        name: file name in the cache, without suffix; derived from the URL by default.

    Raises:
        CheckpointError: a malformed URL, no network, a server error, an incomplete file, a file that is not a checkpoint, a
            sha256 that differs from the recorded one, or a file to download to a cache that cannot be written. If the download
            fails, the message includes the URL and the path under which to save a manual download.
    """
    shown = without_secrets(url)
    try:
        path = cached_path(url, name)
    except ValueError as error:
        raise CheckpointError(f"{shown} is not a valid URL ({error}); check the URL") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            if not path.is_file():
                _download(url, path)
            _compare_digest(shown, path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror or error}); free disk space, or set TORCH_HOME to another directory"
        ) from None
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock a path against other processes of this machine. No effect if the platform or file system does not support locks.

    If the cache is read-only, lock an existing file itself: it is complete, since downloads are renamed to their final name.
    """
    with ExitStack() as stack:
        try:
            file: IO = stack.enter_context(open(path.with_name(path.name + ".lock"), "w"))
        except OSError:
            if not path.is_file():
                raise
            file = stack.enter_context(open(path, "rb"))
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(url: str, path: Path) -> None:
    for stale in path.parent.glob(f"{glob.escape(path.stem)}.*.incomplete{path.suffix}"):
        stale.unlink(missing_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.incomplete{path.suffix}")
    shown, hint = without_secrets(url), f", or download the file with a browser and save it as {path}"
    logger.info("downloading %s to %s", shown, path)
    try:
        with urllib.request.urlopen(_request(url), timeout=TIMEOUT_SECONDS) as response, open(temporary, "wb") as file:
            length = response.headers.get("Content-Length") or ""
            total = int(length) if re.fullmatch(r"[0-9]{1,15}", length) else 0  # a wrong length counts as unknown
            received = _copy(response, file, total, path.name)
            file.flush()
            os.fsync(file.fileno())
        if total and received < total:
            raise CheckpointError(f"{shown}: the connection was closed after {received} of {total} bytes; try again{hint}")
        _check_format(shown, temporary, hint)
        os.replace(temporary, path)
    except urllib.error.HTTPError as error:
        error.close()
        reason = _reason(error.reason)
        raise CheckpointError(f"{shown}: the server answered {error.code} {reason}; check the URL{hint}") from None
    except _FAILURES as error:
        reason = _reason(getattr(error, "reason", None) or error)
        raise CheckpointError(f"{shown} cannot be downloaded ({reason}); check the network and try again{hint}") from None
    except ValueError as error:  # urllib raises it for parts of a URL that cannot be sent
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{shown} cannot be downloaded ({_reason(error)}); check the URL{hint}") from None
    finally:
        temporary.unlink(missing_ok=True)


_FAILURES = (urllib.error.URLError, TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException)


def _request(url: str) -> urllib.request.Request:
    """The request for a URL. Its credentials are sent to its server only, not to the target of a redirect."""
    parts = urlsplit(url)
    credentials, _, host = parts.netloc.rpartition("@")
    url = urlunsplit(parts._replace(netloc=host, fragment=""))
    request = urllib.request.Request(url, headers={"User-Agent": "flatten-transformer"})
    if credentials:
        token = base64.b64encode(unquote(credentials).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def without_secrets(text: str) -> str:
    """Remove credentials, query string and fragment from the URLs in a text."""
    return re.sub(r"(?i)\b([a-z][a-z0-9+.-]{0,20}://)(?:[^\s/?#]*@)?([^\s?#]*)([?#]\S*)?", r"\1\2", text)


def _reason(error: object) -> str:
    """The reason of a failed download on one line. It may contain the URL, or a redirected one, with secrets."""
    return without_secrets(" ".join(str(error).split()))


def _copy(response, file, total: int, title: str) -> int:
    """Copy a response to a file and return the number of bytes. Show a progress bar on a terminal, otherwise log progress."""
    received, last_line = 0, time.monotonic()
    bar_hidden = not sys.stderr.isatty()
    with tqdm(total=total or None, desc=title, unit="B", unit_scale=True, leave=False, disable=bar_hidden) as bar:
        while block := response.read(_BLOCK):
            file.write(block)
            received += len(block)
            bar.update(len(block))
            if bar_hidden and time.monotonic() - last_line > SECONDS_BETWEEN_LOG_LINES:
                last_line = time.monotonic()
                size = f" of {total / 2**20:.0f}" if total else ""  # the server may not send the size
                logger.info("%s: %.0f%s MiB", title, received / 2**20, size)
    return received


def _check_format(url: str, path: Path, hint: str) -> None:
    """Raise ``CheckpointError`` if a download is not a weight file, for example an HTML page with a login form."""
    with open(path, "rb") as file:
        head = file.read(512)
    magic, offset = _TAR_MAGIC
    if not _SIGNATURES.match(head) and head[offset : offset + len(magic)] != magic:
        kind = "an HTML page" if head.lstrip()[:1] == b"<" else "something other than a weight file"
        raise CheckpointError(f"{url}: the server sent {kind} ({path.stat().st_size} bytes); check the URL{hint}")
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        reason = str(error).replace(str(path), "it")
        raise CheckpointError(f"{url}: the downloaded file is damaged or unusable ({reason}); try again{hint}") from None


def _compare_digest(url: str, path: Path) -> None:
    """Record the sha256 of a new file; compare the sha256 of a cached file with its recorded value."""
    record, digest = path.with_name(path.name + ".sha256"), sha256(path)
    recorded = record.read_text(errors="replace").split() if record.is_file() else []
    if not recorded:
        record.write_text(f"{digest}  {path.name}\n")
        logger.info("%s: sha256 %s recorded", path, digest)
    elif recorded[0] != digest:
        raise CheckpointError(
            f"{path}: its sha256 is {digest}, but {recorded[0]} was recorded at its first download from {url}; the file has "
            f"changed. Delete it to download it again; if the change is intended, delete {record.name} too"
        )
