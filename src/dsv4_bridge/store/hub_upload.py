"""Files to a repository on the Hugging Face Hub, by its own client; started again, it goes on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BridgeError, os_error


def upload(folder: Path, repo: str, last: Mapping[str, bytes], ignored: Sequence[str], *, private: bool = False) -> str:
    """Send a folder.

    Args:
        folder: it.
        repo: `owner/name`; it is made if it is not there.
        last: name -> content of files that go behind the others, in this order.
        ignored: patterns of files that do not go.
        private: whether a repository that is made now is private.

    Returns:
        The address of the repository.

    Raises:
        BridgeError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api: Any = HfApi()
    doing = f"publishing {folder} to {repo}"
    common = {"repo_id": repo, "repo_type": "model"}
    sent = {"folder_path": str(folder), "ignore_patterns": list(ignored)}
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        several = getattr(api, "upload_large_folder", None)  # before huggingface_hub 2
        if several:
            several(**common, **sent, print_report=False)
        else:
            api.upload_folder(**common, **sent, commit_message="Upload the files")
        for name, content in last.items():
            api.upload_file(**common, path_or_fileobj=content, path_in_repo=name, commit_message=f"Write {name}")
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        login = (
            "; log in with `hf auth login`, or set HF_TOKEN to a token that may write" if status in (401, 403) else ""
        )
        raise BridgeError(f"{doing}: {_line(error)}{login}") from None
    except OSError as error:
        raise BridgeError(f"{doing}: {os_error(error)}; the same command goes on from there") from None
    except (RuntimeError, ValueError) as error:  # of the client's own and of the library that sends
        raise BridgeError(f"{doing}: {_line(error)}; the same command goes on from there") from None
    return str(url)


def _line(error: Exception) -> str:
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)
