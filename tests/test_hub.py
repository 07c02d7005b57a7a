"""Upload of exported models to the Hugging Face hub, and the header of their cards; the hub is a local server."""

import base64
import http.server
import json
import threading
import time

import huggingface_hub
import pytest
import timm
import torch

from jobs import hub
from jobs.hub import Publication, card_header
from models.checkpoints.reader import sha256
from tests.test_export import checkpoint, run, write_evaluation  # noqa: F401 - checkpoint is a fixture

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


class Hub(http.server.BaseHTTPRequestHandler):
    """The requests of the hub's API that an upload makes. ``server.failing``: start of a path, and status of its response."""

    def do_GET(self):
        self.respond({"name": "anna", "type": "user", "orgs": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self.respond({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        elif "/commit/" in self.path:
            entries = [json.loads(line) for line in body.splitlines()]
            for entry in entries:
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.respond({"commitUrl": f"{self.server.url}/anna/toy/commit/1", "commitOid": "1" * 40})
        elif self.path == "/api/validate-yaml":
            self.respond({"errors": [], "warnings": []})
        else:
            self.server.created.append(json.loads(body))
            self.respond({"url": f"{self.server.url}/anna/toy", "id": "anna/toy", "name": "anna/toy"})

    def respond(self, content: dict) -> None:
        if self.server.silent:
            time.sleep(1)
        failing, status = self.server.failing
        is_failing = failing and self.path.startswith(failing)
        content = {"error": f"refused {self.headers['Authorization']}"} if is_failing else content
        data = json.dumps(content).encode()
        self.send_response(status if is_failing else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files, server.created, server.failing = f"http://127.0.0.1:{server.server_port}", {}, [], ("", 0)
    server.silent = False
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.hf_api, "ENDPOINT", server.url, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def test_a_pushed_model_has_every_exported_file_and_a_card_with_the_measured_accuracy(
    checkpoint,  # noqa: F811
    server,
    tmp_path,
    monkeypatch,
    capsys,
):
    path, ema_model = checkpoint
    write_evaluation(path, tmp_path)
    folder, options = (
        tmp_path / "out",
        ["--push-to-hub", "anna/toy", "--private", "--license", "mit", "--datasets", "anna/toys"],
    )
    run(monkeypatch, path, folder, *options)
    assert server.files == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert set(server.files) == {"README.md", "config.json", "config.yaml", "eval.json", "model.safetensors"}
    (created,) = server.created
    assert created.get("private") is True or created.get("visibility") == "private", created
    card = huggingface_hub.ModelCard(server.files["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == ("timm", "image-classification", "mit")
    assert card.data.datasets == ["anna/toys"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 60.606, "toy")
    assert result.dataset_split == "val"
    assert result.source_url == f"{server.url}/anna/toy/blob/main/eval.json"
    measured = json.loads(server.files["eval.json"])
    assert measured["sha256"] == sha256(path)
    assert "/data" not in server.files["eval.json"].decode()
    assert 'timm.create_model("hf-hub:anna/toy", pretrained=True)' in card.text
    output = capsys.readouterr()
    assert f"uploaded to {server.url}/anna/toy" in output.out
    assert TOKEN not in output.out + output.err
    assert all(TOKEN.encode() not in content for content in server.files.values())
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(images), ema_model.eval()(images))


def refuse(server, monkeypatch, path: str, status: int) -> None:
    server.failing = (path, status)


def silence(server, monkeypatch) -> None:
    server.silent = True
    monkeypatch.setattr(hub, "CHECK_TIMEOUT", 0.1)


PROBLEMS = {
    "no token": (
        lambda server, monkeypatch: monkeypatch.setattr(huggingface_hub, "get_token", lambda: None),
        "anna/toy",
        "no token of the Hugging Face hub; run hf auth login",
    ),
    "invalid token": (
        lambda server, monkeypatch: refuse(server, monkeypatch, "/api/whoami", 401),
        "anna/toy",
        "check the token with hf auth whoami",
    ),
    "silent hub": (
        lambda server, monkeypatch: silence(server, monkeypatch),
        "anna/toy",
        "timed out; check the network connection",
    ),
    "too many requests": (
        lambda server, monkeypatch: refuse(server, monkeypatch, "/api/whoami", 429),
        "anna/toy",
        "; wait some minutes, or export without --push-to-hub",
    ),
    "no network": (lambda server, monkeypatch: server.server_close(), "anna/toy", "check the network connection"),
    "no user": (lambda server, monkeypatch: None, "toy", "give --push-to-hub anna/toy"),
    "invalid name": (lambda server, monkeypatch: None, "anna/to y", "Repo id must use alphanumeric chars"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_an_upload_that_cannot_succeed_is_refused_before_the_export(
    problem,
    checkpoint,  # noqa: F811
    server,
    tmp_path,
    monkeypatch,
    capsys,
):
    prepare, name, message = PROBLEMS[problem]
    prepare(server, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, checkpoint[0], tmp_path / "out", "--push-to-hub", name)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert TOKEN not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("status", "remedy"), [(403, "check the token with hf auth whoami"), (413, "correct what the hub refuses")]
)
def test_after_a_failed_upload_the_export_stays_and_the_error_has_the_command_that_uploads_it(
    status,
    remedy,
    checkpoint,  # noqa: F811
    server,
    tmp_path,
    monkeypatch,
    capsys,
):
    server.failing = ("/api/models/anna/toy/commit", status)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, checkpoint[0], tmp_path / "a b", "--push-to-hub", "anna/toy", "--private")
    error = capsys.readouterr().err
    assert ended.value.code == 1
    assert remedy in error
    assert f"hf upload anna/toy '{tmp_path}/a b' . --private" in error
    assert TOKEN not in error
    assert {file.name for file in (tmp_path / "a b").iterdir()} == {
        "README.md",
        "config.json",
        "config.yaml",
        "model.safetensors",
    }


def test_names_with_yaml_syntax_survive_in_the_header_of_a_card():
    name, data = 'a: "b"\n- x: {#', "[y]: *z\udc80"
    evaluation = {"data": f"/data/{data}", "results": {"ema": {"acc1": 61.23456}}}
    header = card_header(name, Publication("anna/toy", "other: x"), evaluation, "ema", in_timm=False)
    card = huggingface_hub.ModelCard(f"{header}\n")
    assert card.data.model_name == name.replace("\n", "\\n")
    assert card.data.license == "other: x"
    assert card.data.eval_results[0].dataset_name == data.replace("\udc80", "\\udc80")
    assert card.data.eval_results[0].metric_value == 61.235
    assert "library_name" not in header
    assert tuple(card.data.tags) == hub.TAGS
