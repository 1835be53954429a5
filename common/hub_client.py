"""The Hub client's settings, retries and error messages, and the download of a model.

Importing this module limits how long a connection may stall, and keeps signed URLs out of the client's warnings.
"""

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub as hf
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from huggingface_hub.utils._http import default_client_factory

from common.errors import UserError, one_line
from common.pretrained import GENERATION_FILES, TOKENIZER_FILES, WEIGHT_FILES

# A connection that transfers nothing for this long has failed. The client has a limit for downloads only.
STALL_S = 60
QUICK_RETRY_WAITS_S = (1, 2)  # before training, when someone is waiting
# Statuses below 500 that are worth a retry: time-outs, conflicts with another commit, too many requests.
TRANSIENT_STATUSES = (408, 409, 412, 423, 425, 429)
# Errors of this machine's files, which no retry fixes.
LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT)

Log = Callable[[str], None]


def clean(text: str) -> str:
    """Removes tokens from `text`, and user names, passwords and signatures from its URLs."""
    token = hf.get_token()
    if token:
        text = text.replace(token, "<token>")
    text = re.sub(r"\bhf_\w{16,}", "<token>", text)
    text = re.sub(r"(https?://)[^\s/'\"]*@", r"\1", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)


def _clean_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = clean(record.getMessage()), ()
    return True


def _limit_stall(request: httpx2.Request) -> None:
    if (request.extensions.get("timeout") or {}).get("read") is None:
        request.extensions["timeout"] = httpx2.Timeout(STALL_S).as_dict()


def _client() -> httpx2.Client:
    client = default_client_factory()
    # A hook, because some of the library's calls override the client's own time-out with None.
    client.event_hooks["request"].append(_limit_stall)
    return client


hf.set_client_factory(_client)
for handler in logging.getLogger("huggingface_hub").handlers:
    handler.addFilter(_clean_record)  # its warnings quote signed URLs


def address(path: str) -> str:
    """URL of a repository, or of `USER/NAME/tree/main/FOLDER`."""
    return f"{clean(constants.ENDPOINT)}/{path}"


def _origin(error: BaseException) -> BaseException:
    """The Hub's answer, or else the innermost error, in a chain of errors."""
    while error.__cause__ is not None and not isinstance(error, (HfHubHTTPError, UserError)):
        error = error.__cause__
    return error


def reason(error: BaseException) -> str:
    """Why a request failed, in one line."""
    error = _origin(error)
    if isinstance(error, HfHubHTTPError):
        message = one_line(error.server_message or error.response.reason_phrase)
        return clean(f"{error.response.status_code} {message}, from {error.response.url}")[:300]
    return clean(one_line(error))[:300]


def retry(action: Callable[[], Any], waits: Iterable[float], log: Log = lambda line: None) -> Any:
    """Calls `action`, and again after each of `waits` seconds while it fails for a reason that may pass."""
    for wait in waits:
        try:
            return action()
        except Exception as error:  # the errors of the HTTP library, of the Hub's and of Xet have no common base
            origin = _origin(error)
            response = getattr(origin, "response", None)
            status = 500 if response is None else response.status_code
            local = getattr(origin, "errno", None) in LOCAL_ERRORS
            if local or isinstance(origin, ValueError) or (status < 500 and status not in TRANSIENT_STATUSES):
                raise
            asked = response.headers.get("Retry-After", "") if response is not None else ""
            wait = max(wait, int(asked) if asked.isdigit() else 0)
            log(f"the Hub: {reason(error)}; retrying in {wait} s")
            time.sleep(wait)
    return action()


def request(action: Callable[[], Any], failure: str) -> Any:
    """Calls `action` with a few quick retries; raises UserError that starts with `failure`."""
    try:
        return retry(action, QUICK_RETRY_WAITS_S)
    except Exception as error:
        raise UserError(f"{failure}: {reason(error)}") from error


def resolve_model_directory(model_name: str | Path, *, weights: bool = True) -> Path:
    """The local directory of a model: `model_name` itself, or a download of that repository on the Hub.

    Downloads the config, the tokenizer and, if `weights`, the safetensors.

    Raises:
        UserError: the path does not exist, or the repository is unknown, unreachable or gated.
    """
    directory, name = Path(os.path.expanduser(model_name)), str(model_name)
    if name and directory.is_dir():
        return directory
    if not name or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such model directory")
    patterns = ["config.json", *TOKENIZER_FILES, *GENERATION_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        return Path(hf.snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        login = "" if hf.get_token() else ", then run `hf auth login` or set HF_TOKEN"
        raise UserError(f"{name}: gated; ask for access at {address(name)}{login}") from error
    except Exception as error:  # the errors of the HTTP library and the Hub's have no common base
        raise UserError(f"{name}: not a local directory, and not on the Hub: {reason(error)}") from error
