"""Downloads of weight files from a local server."""

import hashlib
import io
import multiprocessing
import pickle
import ssl
import time

import pytest
import torch
from safetensors.torch import save

import models.checkpoints.download
from models.checkpoints.download import cached_path, fetch
from models.checkpoints.reader import CheckpointError, read_checkpoint
from tests.server import serve
from utils.text import printable
from utils.urls import conceal, is_url, reveal, without_secrets


def checkpoint_bytes() -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": {"weight": torch.arange(4096.0)}}, buffer)
    return buffer.getvalue()


GOOD = checkpoint_bytes()
# Response bodies by the last part of the URL path. ``cut`` is truncated at every request, ``once`` only at the first.
BODIES = {
    **dict.fromkeys(("good", "good.pth", "cut", "once"), GOOD),
    "page": b"<!DOCTYPE html><html><body>Please log in</body></html>",
    "damaged": GOOD[:900] + bytes([GOOD[900] ^ 1]) + GOOD[901:],
    "text": b"no weights",
}


def response(status: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([f"HTTP/1.0 {status}", *headers, "", ""]).encode("latin1") + body


SAFETENSORS = save({"weight": torch.arange(4096.0)}, metadata={"flatten": "{}"})
# Complete responses by the last part of the URL path. The words of the status are chosen by the server.
RESPONSES = {
    "text_length": response("200 OK", "Content-Length: abc", body=GOOD),
    "negative_length": response("200 OK", "Content-Length: -5", body=GOOD),
    "other_format": response("200 OK", body=SAFETENSORS),
    "half.safetensors": response("200 OK", body=SAFETENSORS[:9000]),
    "metadata.safetensors": response("200 OK", body=save({"weight": torch.zeros(2)}, metadata={"flatten": "{"})),
    "no_dictionary": response("200 OK", body=pickle.dumps([1, 2], protocol=2)),
    "reason": response("503 try\x1b[31m later"),
    "loop": response("302 Found", "Location: /f/loop?token=SECRET"),
    "file": response("302 Found", "Location: file:///etc/passwd?token=SECRET"),
    "garbage": b"\x00\xff" * 50,
    "endless_headers": b"HTTP/1.0 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n",
}


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with serve(BODIES, RESPONSES) as server:
        yield server


def list_parent_directory(path):
    """Sorted names of the files in the directory of ``path``."""
    return sorted(file.name for file in path.parent.iterdir())


def test_a_file_is_downloaded_once_and_its_sha256_is_recorded(server, tmp_path):
    first = fetch(f"{server.url}/good/?dl=1", "toy")
    assert first == tmp_path / "cache/hub/checkpoints/toy.pth"
    assert first.read_bytes() == GOOD
    assert first.with_name("toy.pth.sha256").read_text().split()[0] == hashlib.sha256(GOOD).hexdigest()
    assert fetch(f"{server.url}/good/?dl=1", "toy") == first
    assert len(server.requests) == 1
    assert torch.equal(read_checkpoint(first)["model"]["weight"], torch.arange(4096.0))


def test_urls_without_a_file_name_have_distinct_cache_paths(server):
    assert cached_path("https://a.org/f/1/?dl=1") != cached_path("https://a.org/f/2/?dl=1")
    assert cached_path("https://a.org/swin.safetensors").suffix == ".safetensors"
    assert fetch(f"{server.url}/good.pth").name.startswith("good-")
    assert is_url("https://a.org/x")
    assert not is_url("flatten_swin_t")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "the server answered 404"),
        ("page", "the server sent an HTML page"),
        ("text", "the server sent something other than a weight file"),
        ("cut", f"the connection was closed after {len(GOOD) // 2} of {len(GOOD)} bytes"),
        ("damaged", "the downloaded file is damaged or unusable"),
    ],
)
def test_failed_download_leaves_only_a_lock_file_and_the_error_gives_the_path_for_a_manual_download(server, name, reason):
    url = f"{server.url}/{name}"
    with pytest.raises(CheckpointError) as caught:
        fetch(url, name)
    message = str(caught.value)
    assert message.startswith(url)
    assert reason in message
    path = cached_path(url, name)
    assert f"save it as {path}" in message
    assert list_parent_directory(path) == [f"{name}.pth.lock"]


def test_download_succeeds_after_an_interrupted_download(server):
    with pytest.raises(CheckpointError, match="the connection was closed"):
        fetch(f"{server.url}/once", "toy")
    assert fetch(f"{server.url}/once", "toy").read_bytes() == GOOD


def test_the_message_of_a_network_error_contains_the_url_and_the_path_for_a_manual_download(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"http://127\.0\.0\.1:9/x cannot be downloaded .*save it as .*toy\.pth"):
        fetch("http://127.0.0.1:9/x", "toy")


def test_tls_error_is_reported_as_a_failed_download(server, monkeypatch):
    def fail(*_):
        raise ssl.SSLError("decryption failed")

    monkeypatch.setattr(models.checkpoints.download, "_copy", fail)
    with pytest.raises(CheckpointError, match=r"cannot be downloaded \(.*decryption failed.*\); check the network"):
        fetch(f"{server.url}/good", "toy")


def test_manually_downloaded_file_is_used_without_a_request(server):
    path = cached_path(f"{server.url}/page", "toy")
    path.parent.mkdir(parents=True)
    path.write_bytes(GOOD)
    assert fetch(f"{server.url}/page", "toy") == path
    assert server.requests == []


def test_file_that_changed_since_its_download_is_rejected(server):
    path = fetch(f"{server.url}/good", "toy")
    path.write_bytes(GOOD + b" ")
    with pytest.raises(CheckpointError, match="was recorded at its first download"):
        fetch(f"{server.url}/good", "toy")
    path.unlink()
    assert fetch(f"{server.url}/good", "toy").read_bytes() == GOOD


def test_concurrent_processes_download_a_file_once(server):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=fetch, args=(f"{server.url}/good", "toy")) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * 4
    assert len(server.requests) == 1


def test_a_file_in_a_cache_that_cannot_be_written_is_used_and_checked(server):
    path = fetch(f"{server.url}/good", "toy")
    lock = path.with_name(path.name + ".lock")
    lock.unlink()
    lock.mkdir()  # opening it for writing fails, also for root
    assert fetch(f"{server.url}/good", "toy") == path
    path.write_bytes(GOOD + b" ")
    with pytest.raises(CheckpointError, match="was recorded at its first download"):
        fetch(f"{server.url}/good", "toy")
    assert len(server.requests) == 1


def test_the_error_for_an_unwritable_cache_suggests_setting_torch_home(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="set TORCH_HOME to another directory"):
        fetch(f"{server.url}/good", "toy")


@pytest.mark.parametrize("name", ["text_length", "negative_length", "other_format"])
def test_odd_headers_and_a_missing_suffix_do_not_prevent_a_download(server, name):
    state = read_checkpoint(fetch(f"{server.url}/{name}"))
    assert torch.equal(state["model"]["weight"], torch.arange(4096.0))


@pytest.mark.parametrize("name", sorted(RESPONSES.keys() - {"text_length", "negative_length", "other_format"}))
def test_unusable_responses_are_reported_on_one_line_and_fetched_again_by_the_next_call(server, name):
    for attempt in (1, 2):
        with pytest.raises(CheckpointError) as caught:
            fetch(f"{server.url}/{name}?token=SECRET")
        message = str(caught.value)
        assert message.startswith(f"{server.url}/{name}")
        assert "\n" not in message
        assert "SECRET" not in message
        assert sum(path.startswith(f"/f/{name}?token=SECRET") for path in server.requests) >= attempt
    assert [path.suffix for path in cached_path(f"{server.url}/{name}").parent.iterdir()] == [".lock"]


@pytest.mark.parametrize("url", ["http://[", "http://host:abc/x", "http://a b/x", "http://\n/x", "http://é" + "e" * 70 + "/x"])
def test_a_malformed_url_is_an_error_on_one_line(url, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"not a valid URL|cannot be downloaded") as caught:
        fetch(url)
    assert len(printable(caught.value).splitlines()) == 1 + url.count("\n")


def test_credentials_and_query_strings_are_used_only_for_the_request(server, caplog):
    caplog.set_level("INFO")
    url = server.url.replace("http://", "http://user:p%40ss@") + "/good.pth?signature=SECRET#part"
    path = fetch(url)
    assert server.requests == ["/f/good.pth?signature=SECRET"]
    assert server.authorizations == ["Basic dXNlcjpwQHNz"]  # user:p@ss
    written = caplog.text + path.name + path.with_name(f"{path.name}.sha256").read_text()
    assert not [secret for secret in ("SECRET", "p%40ss", "p@ss", "user") if secret in written]
    assert fetch(reveal(conceal(url))) == path  # in this process, the concealed URL stands for the original
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://h.org/a.pth?X-Amz-Signature=S&x=1#f", "https://h.org/a.pth"),
        ("cannot read 'https://u:pw@h.org/a?k=S': no", "cannot read 'https://h.org/a': no"),
        (
            "--opts MODEL.PRETRAINED=http://u@h/x?S (S3: s3://key:secret@bucket/x)",
            "--opts MODEL.PRETRAINED=http://h/x (S3: s3://bucket/x)",
        ),
        ("two: HTTPS://a/?S, https://b/#S; end?", "two: HTTPS://a/, https://b/; end?"),
        ("who@where: a//b?c#d", "who@where: a//b?c#d"),
    ],
)
def test_secrets_are_removed_from_every_url_in_a_text(text, expected):
    assert without_secrets(text) == expected


@pytest.mark.parametrize(
    "text", ["http://x?" + ")" * 500_000, "a://" * 200_000, "a.+" * 200_000 + "://", "http://" + "x" * 500_000]
)
def test_secrets_are_removed_from_long_texts_in_linear_time(text):
    started = time.process_time()
    without_secrets(text)
    assert time.process_time() - started < 5
