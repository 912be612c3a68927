# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face hub: repositories, their folders and files, and formats that are not read."""

import importlib
import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

from etils import epath

from vit_jax.checkpoint.listing import is_step
from vit_jax.checkpoint.pretrained.repositories import suggest_repositories
from vit_jax.utils.bounds import read_json
from vit_jax.utils.errors import UserError, first_line
from vit_jax.utils.layout import CHECKPOINTS

INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
# The file to take of several, the preferred ones first.
_NAMES = ("model.safetensors", f"model{INDEX}")

_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl", ".pickle")
_OTHERS = {
    ".h5": "Keras",
    ".keras": "Keras",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".gguf": "GGUF",
    ".tflite": "TensorFlow Lite",
    ".pb": "TensorFlow",
}


_REPOSITORY = re.compile(r"(hf|timm):([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?")
# Of a repository, what is read here.
_CONFIGS = (
    *("config.json", "preprocessor_config.json", "open_clip_config.json"),
    "adapter_config.json",
)
_PATTERNS = ("*.safetensors", f"*{INDEX}", *_CONFIGS)


def is_repository(source: str) -> bool:
    """Whether a source names a repository of the hub: `hf:USER/NAME` or `timm:NAME`."""
    return source.startswith(("hf:", "timm:"))


def fetch_repository(source: str) -> Path:
    """Returns the folder of a repository in the cache of the hub, downloading it if needed.

    Args:
      source: `hf:USER/NAME`, or `timm:NAME` for `hf:timm/NAME`; `@REVISION` may follow.

    Raises:
      UserError: the name is not of this form, huggingface_hub is missing, or the repository can't
        be downloaded.
    """
    repository, revision, hub = _open_hub(source)
    try:
        return Path(
            hub.snapshot_download(repository, revision=revision, allow_patterns=list(_PATTERNS))
        )
    except Exception as e:  # The library raises exceptions of many types, also of its dependencies.
        raise UserError(
            f"{source}: {repository} can't be fetched from the Hugging Face hub ({first_line(e)}); "
            "expected a repository that exists and can be reached: log in with hf auth login if it "
            f"is private, or give the folder of a download{_suggest(source)}"
        ) from e


def find_missing_repository(source: str) -> str | None:
    """Returns the URL of a repository that is not in the cache of the hub; None if it is.

    Takes the same names as `fetch_repository`, and raises `UserError` where that would without a
    network.
    """
    repository, revision, hub = _open_hub(source)
    try:
        hub.snapshot_download(repository, revision=revision, local_files_only=True)
    except Exception:  # Of many types, as above.
        return f"https://huggingface.co/{repository}"
    return None


def _open_hub(source: str) -> tuple[str, str | None, Any]:
    """The repository and the revision that a source names, and the library that fetches it."""
    match = _REPOSITORY.fullmatch(source)
    if match is None or ("/" in match[2]) != (match[1] == "hf"):
        raise UserError(
            f"{source}: expected hf:USER/NAME, or timm:NAME with the tag of the weights, such as "
            "timm:vit_base_patch16_224.augreg2_in21k_ft_in1k; @REVISION may follow"
            f"{_suggest(source)}"
        )
    repository = match[2] if match[1] == "hf" else f"timm/{match[2]}"
    try:
        return repository, match[3], importlib.import_module("huggingface_hub")
    except ImportError:
        raise UserError(
            f"{source} needs huggingface_hub: pip install 'vit_jax[hub]'; or give the folder of a "
            "download"
        ) from None


def _suggest(source: str) -> str:
    """Names the listed models that a source may mean, to append to an error; "" for none."""
    found = suggest_repositories(source)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def find_weights(folder: Path) -> Path | None:
    """Returns the file of weights in a folder of the Hugging Face hub, or of its cache.

    Returns:
      A `.safetensors` file, or the index of its shards; None if the folder holds none, or is the
      workdir of a run or a checkpoint.

    Raises:
      UserError: there are several files, or only files of formats that are not read.
    """
    names = {path.name for path in folder.glob("*")}
    if {CHECKPOINTS, "params", "_METADATA"} & names or any(map(is_step, names)):
        return None
    snapshots = [path for path in (folder / "snapshots").glob("*") if path.is_dir()]
    if len(snapshots) == 1:
        return find_weights(snapshots[0])
    if snapshots:
        listed = ", ".join(sorted(path.name for path in snapshots))
        raise UserError(f"{folder} has several snapshots: expected one of {listed}")
    found = [name for name in names if name.endswith((".safetensors", INDEX))]
    found = [name for name in found if not is_shard(name)]
    for name in (*_NAMES, *found):
        if name in found and (name in _NAMES or len(found) == 1):
            return folder / name
    if found:
        raise UserError(f"{folder} has several files: expected one of {', '.join(sorted(found))}")
    for name in sorted(names):
        refuse_format(folder / name)
    return None


def is_shard(name: str) -> bool:
    """Whether a file name is that of one of several shards."""
    match = _SHARD.fullmatch(name)
    return match is not None and int(match[2]) > 1


def read_index(path: epath.Path) -> dict[str, list[str]]:
    """Reads the index of shards, which are stored in its folder.

    Returns:
      The names of the tensors by the name of the shard.

    Raises:
      ValueError: it is no such index.
    """
    content = read_json(path)
    placed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise ValueError("no weight_map: expected the index of shards")
    shards: dict[str, list[str]] = {}
    for tensor, name in placed.items():
        if not isinstance(name, str) or "/" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{tensor} is in {name!r}: expected a .safetensors file beside it")
        shards.setdefault(name, []).append(tensor)
    return shards


def refuse_shard(path: epath.Path) -> None:
    """Raises a ValueError with what to give instead, if a file is one of several shards."""
    if is_shard(path.name):
        index = re.sub(r"-\d{5}-of-\d{5}\.safetensors$", INDEX, path.name)
        raise ValueError(f"it is one of several shards: give {index} or the folder")


def refuse_format(path: Path | epath.Path) -> None:
    """Raises a UserError with what to do, if a file is of a format that is not read.

    Files of PyTorch are also recognised by their content.
    """
    suffix = path.suffix.lower()
    if not path.is_file():
        return
    if suffix in _PICKLES or _is_pickle(path):
        raise UserError(
            f"{path}: a file of PyTorch is not read, since it is a pickle and can run code; where "
            f"PyTorch is installed, save it as .safetensors by {_command(path)}"
        )
    if suffix in _OTHERS:
        raise UserError(
            f"{path}: a file of {_OTHERS[suffix]} is not read; expected .npz or .safetensors"
        )


def _is_pickle(path: Path | epath.Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(2)
            if start == b"PK":
                with zipfile.ZipFile(file) as archive:
                    return any(name.endswith("/data.pkl") for name in archive.namelist())
    except Exception:  # The reader of the file reports the error; storage raises many types.
        return False
    return start[:1] == b"\x80" and start[1:] in (b"\2", b"\3", b"\4", b"\5")


def _command(path: Path | epath.Path) -> str:
    target = path.parent / f"{Path(path.name.removesuffix('.tar')).stem}.safetensors"
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"x = torch.load({str(path)!r}, map_location='cpu', weights_only=True); "
        "x = x.get('state_dict', x.get('model', x)); "
        "save_file({k: v.contiguous().clone() for k, v in x.items() if torch.is_tensor(v)}, "
        f"{str(target)!r})"
    )
    return f"python -c {shlex.quote(code)}"
