"""Turn the errors of the Hub client into user errors."""

import os
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import TypeAlias
from urllib.parse import quote

import httpx2
from huggingface_hub import constants, get_token, is_offline_mode, set_client_factory
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # its docstring imports it so
from huggingface_hub.utils._http import default_client_factory  # there is no public one

from stages.runtime.errors import UserError, describe_reason, is_out_of_memory
from stages.runtime.secrets import without_secrets
from stages.text import printable

Answer: TypeAlias = HfHubHTTPError | httpx2.HTTPStatusError
CONNECTION_ERRORS = (httpx2.HTTPError, FileMetadataError, ConnectionError)
TOKEN_VARIABLES = ("HF_OIDC_RESOURCE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # in the client's order
# The client's modules that send requests. Its others parse files, such as the card: those errors are the repository's.
CLIENT = re.compile(
    r"huggingface_hub\.(file_download|hf_api|hf_file_system|_snapshot_download|utils\._(auth|http|headers))"
)


@contextmanager
def hub_errors(parameter: str, repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the Hub client's errors into a `UserError` that names the fault and what to do.

    Args:
        parameter: `dataset_name` or `model_name`.
    """
    kind = parameter.removesuffix("_name")
    page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{repo_id}"

    def describe(fault: Exception) -> str:
        if isinstance(fault, Answer):
            return f" {_describe_answer(fault, kind, page, revision)}"
        if is_offline_mode():
            return (
                f": revision {revision or 'main'!r} is not complete in the cache {constants.HF_HUB_CACHE}, and "
                f"HF_HUB_OFFLINE is set; unset it and run again, or use a local {kind}"
            )
        advice = f"check the network and run again (finished downloads are kept), or use a local {kind}"
        return f": {_describe_connection(fault)}; {advice}"

    set_client_factory(_client)
    where = f"{parameter}: {repo_id!r}"
    with _user_errors(where, "is neither a local folder nor a Hub id like owner/name", describe):
        yield


@contextmanager
def upload_errors(repo_id: str) -> Iterator[None]:
    """Turn the Hub client's errors during an upload into a `UserError`."""

    def describe(fault: Exception) -> str:
        if not isinstance(fault, Answer):
            return f": {_describe_connection(fault)}; check the network and run again: nothing was published"
        status, advice = fault.response.status_code, f"see {constants.ENDPOINT}/{repo_id}"
        if status in (401, 403):
            return (
                " can't be written with this token; log in with `hf auth login` or set HF_TOKEN, with a token that may "
                f"write to this repository{_answer(fault)}"
            )
        if status == 429 or status >= 500:
            advice = "wait some minutes and run again"
        return f": the Hub refused the upload; {advice}{_answer(fault)}"

    with _user_errors(f"REPO: {repo_id!r}", "must be an id like owner/name", describe):
        yield


@contextmanager
def _user_errors(where: str, invalid_id: str, describe: Callable[[Exception], str]) -> Iterator[None]:
    """Turn the Hub client's errors into a `UserError`; `invalid_id` and `describe` say what follows `where`."""
    _check_token(where)
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{where} {invalid_id}: {error}") from None
    except Exception as error:
        if (fault := _find_fault(error)) is None:
            raise
        raise UserError(f"{where}{describe(fault)}") from None


def _check_token(where: str) -> None:
    """Check that the token can be sent; the client's errors would contain it."""
    try:
        valid = re.fullmatch("[!-~]*", get_token() or "")
    except UnicodeDecodeError:
        valid = None
    if not valid:
        raise UserError(
            f"{where}: the token of {_token_source()} has characters other than ASCII letters, digits and signs; "
            f"copy it again from {constants.ENDPOINT}/settings/tokens"
        )


def _token_source() -> str:
    return next(filter(os.environ.get, TOKEN_VARIABLES), f"`hf auth login` ({constants.HF_TOKEN_PATH})")


def _client() -> httpx2.Client:
    """The client's session, with limits to its waiting, and without mistaking web pages for data."""
    client = default_client_factory()
    client.event_hooks["request"].append(_limit_timeout)
    client.event_hooks["response"].append(_reject_web_page)
    return client


def _limit_timeout(request: httpx2.Request) -> None:
    """Limit the time without a byte: listings have no limit, and repeated requests for metadata 60 seconds."""
    limit = max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT)
    timeout = request.extensions["timeout"]
    request.extensions["timeout"] = {name: min(value or limit, limit) for name, value in timeout.items()}


def _reject_web_page(response: httpx2.Response) -> None:
    """Reject the login page of a proxy. The Hub has no web pages among its metadata and data files."""
    if response.is_success and "text/html" in response.headers.get("Content-Type", ""):
        url = response.url.copy_with(query=None, fragment=None)
        raise httpx2.ProxyError(f"{url} is a web page, such as the login page of a proxy", request=response.request)


def _find_fault(error: Exception) -> Exception | None:
    """The error of the Hub client that caused this one; None if the files or this machine are the cause."""
    if (isinstance(error, OSError) and error.errno) or isinstance(error, UserError) or is_out_of_memory(error):
        return None
    faults: list[Exception] = []
    link: BaseException | None = error
    is_cause = True
    while isinstance(link, Exception):
        # `datasets` looks for files that may be missing: that one is, is a cause only if an error says so.
        is_missing = isinstance(link, RemoteEntryNotFoundError) or type(link) is FileNotFoundError
        if (is_cause or not is_missing) and (isinstance(link, CONNECTION_ERRORS) or _is_from_client(link)):
            faults.append(link)
        is_cause = link.__cause__ is not None
        link = link.__cause__ or link.__context__
    for kind in (HfHubHTTPError, *CONNECTION_ERRORS, Exception):
        for fault in faults:
            if isinstance(fault, kind):
                return fault
    return None


def _is_from_client(error: Exception) -> bool:
    return any(CLIENT.fullmatch(frame.f_globals.get("__name__", "")) for frame, _ in walk_tb(error.__traceback__))


def _describe_answer(error: Answer, kind: str, page: str, revision: str | None) -> str:
    """What the Hub refused, why, and what to do."""
    status, headers = error.response.status_code, error.response.headers
    source = _token_source() if get_token() else None
    login = "log in with `hf auth login` or set HF_TOKEN"
    limits = parse_ratelimit_headers(headers)
    wait = headers.get("Retry-After") or (limits and limits.reset_in_seconds)
    wait = f"wait {str(wait)[:40]}{' seconds' * str(wait).isdigit()}" if wait else "wait some minutes"
    match headers.get("X-Error-Code"), status:
        case "GatedRepo", _:
            text = f"is gated; accept its conditions at {page}, then {login}"
        case "RepoNotFound", _:
            text = f"is not on the Hub at {constants.ENDPOINT}, or it is private; check the id, or {login}"
        case "RevisionNotFound", _ if f"/{quote(str(revision), safe='')}" in str(error.response.url):
            text = f"has no revision {revision!r}; set {kind}_revision to one of its branches, tags or commits"
        case "RevisionNotFound", _:
            text = f"changed during the download, its commit is gone; run again, or set {kind}_revision"
        case _, 401 if source:
            text = (
                f"can't be read: the Hub refused the token of {source}, which is wrong or expired; create one at "
                f"{constants.ENDPOINT}/settings/tokens, then {login}"
            )
        case _, 401 | 403 if not isinstance(error, DisabledRepoError):
            text = f"can't be read {f'with the token of {source}' if source else 'without a token'}; "
            text += f"accept the conditions at {page} if it has some, and {login}, with a token that may read it"
        case _, 404 | 410:
            text = f"has lost a file or a commit; see {page}, and set {kind}_revision to a complete one, or HF_ENDPOINT"
        case _, 407:
            text = "can't be read: the proxy asks for a login; put it into HTTPS_PROXY or HTTP_PROXY"
        case _, 408 | 425 | 429:
            text = (
                f"can't be read now: the Hub got too many requests; {wait} and run again (finished downloads are kept)"
            )
        case _, _ if status >= 500:
            text = f"can't be read now: the Hub has a fault; {wait} and run again (finished downloads are kept)"
        case _:
            text = f"can't be read: the Hub refused the request; see {page}, or use another {kind}"
    return text + _answer(error)


def _answer(error: Answer) -> str:
    """The status and the text of the Hub's answer, on one line and without secrets."""
    text = without_secrets(printable(getattr(error, "server_message", None) or error.response.reason_phrase))
    if token := get_token():
        text = text.replace(token, "***")
    return f" (answer: {error.response.status_code} {textwrap.shorten(text, 200, placeholder=' ...')})"


def _describe_connection(error: Exception) -> str:
    """Why there is no answer from the Hub."""
    reason = describe_reason(error)
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.InvalidURL):
        return f"HF_ENDPOINT is {constants.ENDPOINT!r}; must be a URL that begins with https:// ({reason})"
    if isinstance(error, httpx2.ProxyError | FileMetadataError):
        return (
            f"a proxy or another server answered instead of the Hub at {constants.ENDPOINT} ({reason}); log in to the "
            "network, or correct HF_ENDPOINT, HTTP_PROXY or HTTPS_PROXY"
        )
    return f"the connection to the Hub at {constants.ENDPOINT} failed ({reason})"
