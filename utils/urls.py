"""URLs of weight files, and the removal of secrets from text that is stored or printed.

Signed URLs have a secret in their query string, and others have a user name and a password. Secrets are used only for the
request itself. This module does not import torch, because command-line checks use it.
"""

import os
import re

# Parts of the names of environment variables whose values are secrets, such as WANDB_API_KEY and MLFLOW_TRACKING_PASSWORD.
_SECRET_NAMES = ("KEY", "TOKEN", "PASSWORD", "SECRET")
_MIN_SECRET_LENGTH = 8  # a shorter value may be part of other words
# A URL of any scheme: scheme, credentials, host with path, and query string or fragment.
_URL = re.compile(
    r"""\b([a-z][a-z0-9+.-]{0,20}://)(?:[^\s/?#"<>]*@)?([^\s?#"<>]*)([?#][^\s"<>]*)?""",
    re.IGNORECASE,
)
_PUNCTUATION = ".,;:)]}'`"  # at the end of a query string, it belongs to the surrounding text
# URL without secrets -> the URL. A config has only the former, since copies of it are stored in many files: secrets that are
# removed when the config is loaded cannot reach any of them. Only ``reveal`` returns them, for the request.
_originals: dict[str, str] = {}


def is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def without_secrets(text: str) -> str:
    """Remove credentials, query string and fragment from every URL in a text."""
    return _URL.sub(_shorten, text) if "://" in text else text


def _shorten(match: re.Match) -> str:
    scheme, location, query = match.groups(default="")
    return f"{scheme}{location}{query[len(query.rstrip(_PUNCTUATION)) :]}"


def conceal(text: str) -> str:
    """Return ``text`` without the secrets of its URL; in this process, ``reveal`` returns the original of the result."""
    concealed = without_secrets(text) if is_url(text) else text
    if concealed != text:
        _originals[concealed] = text
    return concealed


def reveal(text: str) -> str:
    """The URL that ``conceal`` has last shortened to ``text``; ``text`` itself if there is none."""
    return _originals.get(text, text)


def without_environment_secrets(text: str) -> str:
    """Replace secrets that environment variables contain by ``$`` and the name of the variable, and remove those of URLs."""
    for name, value in os.environ.items():
        if len(value) >= _MIN_SECRET_LENGTH and any(part in name.upper() for part in _SECRET_NAMES):
            text = text.replace(value, f"${name}")
    return without_secrets(text)
