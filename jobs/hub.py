"""The Hugging Face hub: the header of a model card, and the upload of an exported directory."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.utils
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from utils.errors import ConfigError
from utils.text import escape
from utils.urls import without_environment_secrets

TAGS = ("image-classification", "timm", "flatten-transformer", "focused-linear-attention")
EVALUATION = "eval.json"
# Seconds without any data from the hub after which a request fails; huggingface_hub would wait without limit.
CHECK_TIMEOUT, UPLOAD_TIMEOUT = 30, 300


class UploadError(RuntimeError):
    """The upload of an exported directory failed; the directory is complete."""


@dataclass(frozen=True)
class Publication:
    """What the card of a published model says about it, beside what the checkpoint contains.

    Args:
        repository: USER/NAME on the hub; "" if unknown.
        license_id: the hub's identifier of the licence, such as mit; "" to leave it out.
        datasets: the hub's identifiers of the training data.
    """

    repository: str = ""
    license_id: str = ""
    datasets: tuple[str, ...] = ()


def card_header(name: str, publication: Publication, evaluation: dict | None, label: str, *, in_timm: bool) -> str:
    """YAML header of a model card, with its delimiters.

    Args:
        name: name of the model.
        evaluation: contents of an ``eval.json``, with results of the weights ``label``; None if the accuracy was not measured.
        in_timm: whether timm can load the exported model.
    """
    results = []
    if evaluation is not None:
        source: dict[str, Any] = {}
        if publication.repository:
            url = f"{huggingface_hub.constants.ENDPOINT}/{publication.repository}/blob/main/{EVALUATION}"
            source = {"source_name": EVALUATION, "source_url": url}
        conditions = stored_conditions(evaluation)
        data = _plain(Path(evaluation["data"]).name) or "unknown"
        results.append(
            huggingface_hub.EvalResult(
                task_type="image-classification",
                dataset_type=data,
                dataset_name=data,
                dataset_split=_plain(stored_split(evaluation)) or None,
                metric_type="accuracy",
                metric_name=_plain(f"Top-1 accuracy (%){f', {conditions}' if conditions else ''}"),
                metric_value=round(evaluation["results"][label]["acc1"], 3),
                **source,
            )
        )
    header = huggingface_hub.ModelCardData(
        model_name=_plain(name),
        pipeline_tag="image-classification",
        library_name="timm" if in_timm else None,
        license=publication.license_id or None,
        datasets=list(publication.datasets) or None,
        tags=list(TAGS),
        eval_results=results or None,
    )
    return f"---\n{header.to_yaml()}\n---"


def stored_conditions(evaluation: dict) -> str:
    """The result of ``describe_conditions`` for the contents of an ``eval.json``; earlier versions had no TEST.TTA."""
    from engine.evaluation import describe_conditions  # imports torch, which the checks of an upload do not need

    return describe_conditions(str(evaluation.get("restriction") or ""), evaluation.get("tta", "none"))


def stored_split(evaluation: dict) -> str:
    """The images of an evaluation, by the contents of its ``eval.json``; "" if an earlier version wrote that file."""
    split, fraction = evaluation.get("split", ""), evaluation.get("val_fraction", 0)
    return f"a fraction of {fraction:g} of {split}, which is held out" if split and fraction else split


def _plain(text: str) -> str:
    """A name without HTML and Markdown code, which a program that does not know YAML headers would render."""
    return re.sub("[<>`]", "_", escape(text))


def check_hub(repository: str) -> None:
    """Check the name of a repository, the token and the connection, before the model is exported.

    Raises:
        ConfigError: the name is not USER/NAME, or the hub cannot be reached or does not accept the token.
    """
    option = f"--push-to-hub {repository}"
    try:
        huggingface_hub.utils.validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{option}: {error}") from None
    token = huggingface_hub.get_token()
    if token is None:
        raise ConfigError(
            f"{option}: no token of the Hugging Face hub; run hf auth login with a token that may write, or set HF_TOKEN"
        )
    try:
        limit_waiting(CHECK_TIMEOUT)
        user = huggingface_hub.HfApi(token=token).whoami()["name"]
    except Exception as error:
        raise ConfigError(f"{option}: {_describe(error, token)}, or export without --push-to-hub") from None
    if "/" not in repository:
        raise ConfigError(f"{option}: the user or organization is missing; give --push-to-hub {user}/{repository}")


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Create a repository if it does not exist, and upload an exported directory. Returns the URL of the repository.

    Raises:
        UploadError: the upload failed; the message has the command that repeats it.
    """
    token = huggingface_hub.get_token() or ""
    api: Any = huggingface_hub.HfApi(token=token)
    try:
        limit_waiting(UPLOAD_TIMEOUT)
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload of an exported model")
    except Exception as error:
        flag = " --private" if private else ""
        raise UploadError(
            f"{folder} is complete, but was not uploaded: {_describe(error, token)}; then run "
            f"hf upload {repository} {shlex.quote(str(folder))} .{flag}"
        ) from None
    return str(url)


def limit_waiting(seconds: float) -> None:
    """Let requests of huggingface_hub fail if the hub is silent for this long."""
    session: Any = huggingface_hub.utils.get_session()
    session.timeout = seconds


def _describe(error: Exception, token: str) -> str:
    """Reason of a failed request, and remedy, without the token: a server may repeat it in its message."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        reason = f"the response of the hub lacks {reason}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        remedy = "unset HF_HUB_OFFLINE"
    elif status in (401, 403):
        remedy = "check the token with hf auth whoami: it must be valid, and may need the permission to write"
    elif status == 429 or (status is not None and status >= 500):
        remedy = "wait some minutes"
    elif status is not None:
        remedy = "correct what the hub refuses"
    else:
        remedy = "check the network connection"
    return f"{without_environment_secrets(reason.replace(token, '***') if token else reason)}; {remedy}"
