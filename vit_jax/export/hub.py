# SPDX-License-Identifier: Apache-2.0
"""Uploads an exported folder to the Hugging Face hub."""

import importlib
import re
from pathlib import Path
from typing import Any

from vit_jax.utils.errors import UserError, first_line
from vit_jax.utils.text import describe_size

_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def check_push(repo: str, *, now: bool) -> None:
    """Raises `UserError` if `repo` is not USER/NAME, or if the library for uploads is missing."""
    if not _REPO.fullmatch(repo):
        raise UserError(f"--push={repo}: expected USER/NAME")
    if now:
        _import_hub()


def push_folder(folder: Path, repo: str, *, private: bool, now: bool) -> list[str]:
    """Uploads all files of a folder if `now`, or describes the upload; returns lines to log.

    The repository `USER/NAME` is created if it does not exist, and is then `private` or public.

    Raises:
      UserError: the hub refuses the upload, or cannot be reached.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    lines = [
        f"  {path.relative_to(folder)} ({describe_size(path.stat().st_size)})" for path in files
    ]
    what = f"{len(files)} files, {describe_size(size)}"
    kind = "private" if private else "public"
    if not now:
        head = f"would upload to {repo} on the Hugging Face hub, {kind} if it is new: {what}"
        return [head, *lines, "nothing is uploaded; add --yes to do it"]
    hub = _import_hub()
    try:
        api = hub.HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=str(folder), commit_message="Export by vit_jax"
        )
    except Exception as e:  # The library raises exceptions of many types, also of its dependencies.
        raise UserError(
            f"--push={repo}: {first_line(e)}; {folder} stays: log in with hf auth login, then "
            f"hf upload {repo} {folder}"
        ) from e
    return [f"uploaded {what}: {getattr(commit, 'commit_url', commit)}", *lines]


def _import_hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise UserError("--push needs huggingface_hub: pip install 'vit_jax[hub]'") from None
