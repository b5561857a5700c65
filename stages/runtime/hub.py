"""Turn Hub client errors into user errors."""

from collections.abc import Iterator
from contextlib import contextmanager

from httpx2 import HTTPError
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from stages.runtime.errors import UserError


@contextmanager
def hub_errors(parameter: str, repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the Hub client's errors into a `UserError` that names the parameter to change.

    Args:
        parameter: `dataset_name` or `model_name`.
    """
    kind = parameter.removesuffix("_name")
    where = f"{parameter}: {repo_id!r}"
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{where} is gated; accept its conditions at {constants.ENDPOINT}/{repo_id}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{where} is not on the Hub at {constants.ENDPOINT}, or it is private; "
            "check the id, or log in with `hf auth login` or HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{where} has no revision {revision!r}; set {kind}_revision to one of its branches, tags or commits"
        ) from None
    except HFValidationError as error:
        raise UserError(f"{where} is neither a local folder nor a Hub id like owner/name: {error}") from None
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(
            f"{where}: the connection to the Hub at {constants.ENDPOINT} failed ({reason}); "
            f"check the network and run again (finished downloads are kept), or use a local {kind}"
        ) from None


@contextmanager
def upload_errors(repo_id: str) -> Iterator[None]:
    """Turn the Hub client's errors during an upload into a `UserError`."""
    where = f"REPO: {repo_id!r}"
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{where} must be an id like owner/name: {error}") from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise UserError(
                f"{where} can't be written with this token; log in with `hf auth login` or set HF_TOKEN, with a token "
                "that may write to this repository"
            ) from None
        raise UserError(f"{where}: the Hub refused the upload: {error}; see {constants.ENDPOINT}/{repo_id}") from None
    except (HTTPError, OfflineModeIsEnabled, ConnectionError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(
            f"{where}: the connection to the Hub at {constants.ENDPOINT} failed ({reason}); check the network and run "
            "again: nothing was published"
        ) from None
