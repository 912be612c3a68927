# SPDX-License-Identifier: Apache-2.0
"""The files of the splits of a dataset repository, as the library `datasets` finds them.

A section `configs` at the start of `README.md` lists the files of each subset and split; without
one, words in the paths do. Source: "Structure your repository" in the documentation of `datasets`,
https://huggingface.co/docs/datasets/repository_structure.
"""

import collections
import dataclasses
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from vit_jax.data.sources.files import ENDINGS
from vit_jax.data.sources.layout import find_split, list_few
from vit_jax.data.sources.ranges import translate_pattern
from vit_jax.data.sources.tables import Feature
from vit_jax.utils.bounds import MAX_JSON
from vit_jax.utils.errors import UserError, describe_error
from vit_jax.utils.suggestions import suggest

CARD = "README.md"
TABLES = (".parquet", ".arrow")
# The kinds of files that are read, by their endings.
_KINDS = dict.fromkeys(TABLES, "tables") | dict.fromkeys(ENDINGS, "images") | {".tar": "tar"}
# Files beside images.
_METADATA = (".csv", ".jsonl", ".txt")
# One of several files of a split, as `data/train-00000-of-00005.parquet`.
_SHARD = re.compile(r"(?P<split>\w+)-(?P<number>\d{5})-of-(?P<count>\d{5})[^/]*")
# The files of the branch `refs/convert/parquet`, which the hub makes: SUBSET/SPLIT/0000.parquet.
_CONVERTED = re.compile(r"([^/]+)/(?:partial-)?([^/]+)/\d{4}\.parquet")
CONVERTED = "refs/convert/parquet"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The files of one subset.

    Attributes:
      kind: "tables", "images" or "tar".
      files: paths from the folder of the repository, in their order.
      splits: the name of the split of each file; None where the paths do not say it.
      patterns: the pattern of the card that each file matches; None where the card lists no files.
      folder: that the card names for the subset, with all files in it; empty for any.
      features: of columns, as the card has them.
      lengths: the number of examples of splits, as the card has them.
    """

    kind: str
    files: list[str]
    splits: list[str | None]
    patterns: list[str] | None
    folder: str
    features: dict[str, Feature]
    lengths: dict[str, int]


def find_layout(paths: Sequence[str], card: str, *, subset: str | None, key: str) -> Layout:
    """Finds the files of a subset.

    Args:
      paths: of all files of the repository, from its folder.
      card: the text of its `README.md`; empty without one.
      subset: its name; None for the only one, or that of the name "default".
      key: starts all errors.

    Raises:
      UserError: the card is not valid, there is no such subset or none that is read, or one of
        several files of a split is missing.
    """
    header = _read_header(card, key=key)
    visible = sorted(path for path in paths if _is_visible(path))
    configs = _read_configs(header, key=key)
    listed, folder = None, ""
    if configs:
        config = _choose(configs, subset, key=key)
        listed = _list_files(config, visible, key=key)
        if listed is not None:
            given = [(path, split) for path, (split, _) in listed.items()]
        else:
            folder = str(config.get("data_dir") or "").strip("./")
            inside = [path for path in visible if not folder or path.startswith(f"{folder}/")]
            given = _infer_splits(inside)
    else:
        given = _split_converted(visible, subset, key=key)
        if given is None and subset is not None:
            raise UserError(f"{key}: it has no subsets: expected the name without subset={subset}")
        given = given if given is not None else _infer_splits(visible)
    if configs and not given:
        name = _choose(configs, subset, key=key)["config_name"]
        raise UserError(f"{key}: {CARD}: there are no files of the subset {name}")
    _check_shards(visible, given, key=key)
    kind = _find_kind([path for path, _ in given], visible, key=key)
    if others := [path for path, _ in given if kind_of(path) not in (None, kind)]:
        logger.info("%s: left out files of another kind: %s", key, list_few(others))
    given = [(path, split) for path, split in given if kind_of(path) == kind]
    chosen = None if not configs else str(_choose(configs, subset, key=key)["config_name"])
    info = _read_info(header, chosen or subset)
    return Layout(
        kind,
        [path for path, _ in given],
        [split for _, split in given],
        None if listed is None else [listed[path][1] for path, _ in given],
        folder,
        _read_features(info.get("features")),
        _read_lengths(info.get("splits")),
    )


def kind_of(path: str) -> str | None:
    """The kind of a file that holds images, by its ending; None for another one."""
    return _KINDS.get(os.path.splitext(path)[1].lower())


def name_splits(names: Iterable[str]) -> dict[str, str]:
    """What names of splits mean: `val` is `validation`, unless another one means the same."""
    meant = {name: find_split(name) or name for name in names}
    counts = collections.Counter(meant.values())
    return {name: name if counts[split] > 1 else split for name, split in meant.items()}


def _is_visible(path: str) -> bool:
    parts = path.split("/")
    return not any(part.startswith((".", "__")) for part in parts) and path != CARD


class _CardLoader(yaml.SafeLoader):
    """Reads class names as the texts that they are written as: `no` is not False, nor 010 8."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, value in node.value:
            if key.value == "names":
                mapping = isinstance(value, yaml.MappingNode)
                names = [name for _, name in value.value] if mapping else value.value
                for name in names if isinstance(value, yaml.CollectionNode) else []:
                    if isinstance(name, yaml.ScalarNode):
                        name.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep=deep)


def _read_header(card: str, *, key: str) -> Mapping[str, Any]:
    """The YAML at the start of a card."""
    found = re.match(r"\ufeff?---[ \t]*\r?\n(.*?\n)---[ \t]*(\r?\n|$)", card, flags=re.DOTALL)
    if not found:
        return {}
    try:
        if len(found[1]) > MAX_JSON:
            raise ValueError(f"it has {len(found[1]):,} characters")
        header = yaml.load(found[1], Loader=_CardLoader)
    except (ValueError, yaml.YAMLError, RecursionError) as e:
        reason = describe_error(e)
        raise UserError(f"{key}: the YAML in {CARD} can't be read: {reason}") from None
    return header if isinstance(header, dict) else {}


def _read_configs(header: Mapping[str, Any], *, key: str) -> list[dict[str, Any]]:
    configs = header.get("configs")
    if configs is None:
        return []
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        raise UserError(f"{key}: {CARD}: configs: expected a list of subsets")
    return [{"config_name": "default", **config} for config in configs]


def _choose(configs: Sequence[dict[str, Any]], subset: str | None, *, key: str) -> dict[str, Any]:
    names = [str(config["config_name"]) for config in configs]
    if subset is None and len(names) > 1:
        marked = [config for config in configs if config.get("default") is True]
        marked = marked or [c for c in configs if c["config_name"] == "default"]
        if len(marked) == 1:
            return marked[0]
        raise _lack_subset(names, None, key=key)
    if subset is not None and subset not in names:
        raise _lack_subset(names, subset, key=key)
    return configs[0 if subset is None else names.index(subset)]


def _lack_subset(names: Sequence[str], subset: str | None, *, key: str) -> UserError:
    if subset is None:
        return UserError(
            f"{key} has the subsets {list_few(names)}: expected one of them, as in "
            f"hf:NAME#subset={names[0]}"
        )
    return UserError(f"{key}: there is no subset {subset!r}{suggest(subset, names)}")


def _list_files(
    config: Mapping[str, Any], visible: Sequence[str], *, key: str
) -> dict[str, tuple[str, str]] | None:
    """The split and the pattern of each file that a config lists; None if it lists none."""
    listed = config.get("data_files")
    if listed is None:
        return None
    where = f"{key}: {CARD}: data_files of {config['config_name']}"
    listed = [listed] if isinstance(listed, str | dict) else listed
    if not isinstance(listed, list):
        raise UserError(f"{where}: expected paths, or a split and path for each")
    folder = str(config.get("data_dir") or "").strip("./")
    found: dict[str, tuple[str, str]] = {}
    for entry in listed:
        split, patterns = "train", entry
        if isinstance(entry, dict):
            split, patterns = str(entry.get("split", "train")), entry.get("path")
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
            raise UserError(f"{where}: {str(entry)[:80]}: expected a split and its path")
        for pattern in patterns:
            if "://" in pattern:
                raise UserError(
                    f"{where}: {pattern[:200]}: only files of the repository itself are read"
                )
            pattern = os.path.normpath(os.path.join(folder, pattern))
            wanted = re.compile(translate_pattern(pattern))
            files = [p for p in visible if wanted.fullmatch(p) or p.startswith(f"{pattern}/")]
            if not files:
                raise UserError(f"{where}: there are no files {pattern}")
            for path in files:
                first, _ = found.setdefault(path, (split, pattern))
                if first != split:
                    raise UserError(
                        f"{where}: {path} is in the splits {first} and {split}: expected one of "
                        "them"
                    )
    return found


def _infer_splits(paths: Sequence[str]) -> list[tuple[str, str | None]]:
    """The split of each file by its name, or else by its folders, from the last to the first."""
    shards = [(path, _SHARD.fullmatch(os.path.basename(path))) for path in paths]
    named = [(path, shard["split"]) for path, shard in shards if shard]
    tables = [path for path in paths if kind_of(path) in ("tables", "tar")]
    if named and len(named) == len(tables):
        return list(named)
    return [(path, _infer_split(path)) for path in paths]


def _infer_split(path: str) -> str | None:
    for part in reversed(os.path.splitext(path)[0].split("/")):
        found = {find_split(word) for word in re.split(r"[-._ 0-9]+", part)} - {None}
        if len(found) == 1:
            return found.pop()
    return None


def _split_converted(
    visible: Sequence[str], subset: str | None, *, key: str
) -> list[tuple[str, str | None]] | None:
    """The files of a subset in the branch that the hub makes; None in any other."""
    matches = [_CONVERTED.fullmatch(path) for path in visible]
    if not visible or not all(matches):
        return None
    names = list(dict.fromkeys(match[1] for match in matches if match))
    if subset is None and len(names) > 1 and "default" not in names:
        raise _lack_subset(names, None, key=key)
    wanted = subset or ("default" if "default" in names else names[0])
    if wanted not in names:
        raise _lack_subset(names, wanted, key=key)
    return [(match[0], match[2]) for match in matches if match and match[1] == wanted]


def _check_shards(
    visible: Sequence[str], given: Sequence[tuple[str, str | None]], *, key: str
) -> None:
    """Raises `UserError` if one of several files is nowhere in the repository."""
    numbers: dict[tuple[str, str, int], set[int]] = collections.defaultdict(set)
    used = {path for path, _ in given}
    wanted = set()
    for path in visible:
        folder, name = os.path.split(path)
        if shard := re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})([^/]*)", name):
            group = os.path.join(folder, shard[1]), shard[4].rpartition(".")[2], int(shard[3])
            numbers[group].add(int(shard[2]))
            if path in used:
                wanted.add(group)
    for group in sorted(wanted):
        start, ending, count = group
        missing = [number for number in range(count) if number not in numbers[group]]
        if missing:
            more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
            raise UserError(
                f"{key}: {start}-{missing[0]:05}-of-{count:05}.{ending}{more} is missing: expected "
                "all files of a split"
            )


def _find_kind(paths: Sequence[str], visible: Sequence[str], *, key: str) -> str:
    """What the files are; raises `UserError` if none are read."""
    kinds = {kind_of(path) for path in paths}
    for kind in ("tables", "tar", "images"):
        if kind in kinds:
            return kind
    endings = collections.Counter(os.path.splitext(path)[1] or path for path in paths or visible)
    found = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(5))
    raise UserError(
        f"{key} holds {found or 'no files'}: expected Parquet, Arrow or tar files, or images; the "
        f"hub has a copy of most datasets in Parquet: hf:OWNER/NAME@{CONVERTED}"
    )


def _read_info(header: Mapping[str, Any], subset: str | None) -> Mapping[str, Any]:
    """The section `dataset_info` of a card on a subset."""
    infos = header.get("dataset_info")
    infos = infos if isinstance(infos, list) else [infos]
    infos = [info for info in infos if isinstance(info, dict)]
    named = [info for info in infos if info.get("config_name", "default") == (subset or "default")]
    found = named or infos
    return found[0] if len(found) == 1 else {}


def _read_features(features: Any) -> dict[str, Feature]:
    """The features of columns as a card has them."""
    found = {}
    for feature in features if isinstance(features, list) else []:
        if not isinstance(feature, dict):
            continue
        kind = next((feature[k] for k in ("sequence", "list", "dtype") if k in feature), None)
        if isinstance(kind, dict) and "dtype" in kind:
            kind = kind["dtype"]
        label = kind.get("class_label") if isinstance(kind, dict) else None
        if isinstance(label, dict):
            names = label.get("names")
            found[str(feature.get("name"))] = Feature("ClassLabel", _read_names(names))
        elif kind == "image":
            found[str(feature.get("name"))] = Feature("Image")
    return found


def _read_names(names: Any) -> list[str] | None:
    """The names of classes, which are a list or have their number as their key."""
    if isinstance(names, dict):
        numbers = {str(number): str(name) for number, name in names.items()}
        keys = [str(number) for number in range(len(numbers))]
        return [numbers[k] for k in keys] if set(keys) == set(numbers) else None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def _read_lengths(splits: Any) -> dict[str, int]:
    lengths = {}
    for split in splits if isinstance(splits, list) else []:
        if isinstance(split, dict) and isinstance(split.get("num_examples"), int):
            lengths[str(split.get("name"))] = split["num_examples"]
    return lengths
