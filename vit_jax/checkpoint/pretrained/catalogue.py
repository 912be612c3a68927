# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints by name: `catalogue.csv` has one row for each file.

A name is `COLLECTION:MODEL[@PIXELS]`. Collections are the folders in which the files are published
(`imagenet21k`, `augreg`, `sam`, ...); `@PIXELS` is the resolution of fine-tuning, where there are
several. `augreg:B/16` is the recommended checkpoint of its size. The other 50,000 AugReg files are
named `augreg:FILENAME`, and `augreg:B_16` is the best B/16 by their `index.csv`.
"""

import csv
import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vit_jax.checkpoint.pretrained.repositories import load_repositories
from vit_jax.utils.bounds import MAX_TABLE, read_text
from vit_jax.utils.errors import UserError
from vit_jax.utils.suggestions import fold, suggest

CATALOGUE = Path(__file__).with_name("catalogue.csv")
AUGREG_FOLDER = "gs://vit_models/augreg/"
AUGREG_INDEX = AUGREG_FOLDER + "index.csv"

# A collection has neither dot nor slash: `weights.npz:params` and `gs://...` are not names.
_NAME = re.compile(r"([\w+-]+):(?!//)(.+)")
# A model as in the names of AugReg's files.
_INDEXED = re.compile(r"(?:R\d*_)?[A-Z][a-z]?_\d+")
_GOOGLE_STORAGE = "https://storage.googleapis.com/"
_NUM_CLASSES = {
    "imagenet2012": 1000,
    "imagenet21k": 21843,
    "cifar100": 100,
    "oxford_iiit_pet": 37,
    "resisc45": 45,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One published checkpoint; unknown values are None or empty.

    Attributes:
      name: `COLLECTION:MODEL[@PIXELS]`.
      model: `model.name` of the config.
      variant: `model.variant` of the config.
      image_size: height and width in pixels that its position embeddings fit.
      pretraining: datasets of its training, in order, joined by `+`.
      num_classes: classes of the head in the file.
      head: "valid", "zero" (all zeros) or "none".
      mean: of pixels in [0, 1], as in training; with `std`, 0.5 and 0.5 give [-1, 1].
      std: see `mean`.
      eval: value of `data.preprocess` for evaluation.
      top1: published ImageNet accuracy in percent.
      top1_image_size: height and width at which `top1` was measured.
      images_per_sec: published inference speed; only comparable within a collection.
      size: bytes of the file.
      sha256: of the file.
      recommended: whether its publishers recommend it among files of one size.
      licence: SPDX identifier.
      url_gs: `gs://BUCKET/PATH`.
      url_https: the same file over HTTPS.
      source: page on which the file and the numbers are published.
      note: anything else that users must know.
    """

    name: str
    model: str
    variant: str
    image_size: int
    pretraining: str
    num_classes: int | None
    head: str
    mean: float
    std: float
    eval: str
    top1: float | None = None
    top1_image_size: int | None = None
    images_per_sec: float | None = None
    size: int | None = None
    sha256: str = ""
    recommended: bool = False
    licence: str = ""
    url_gs: str = ""
    url_https: str = ""
    source: str = ""
    note: str = ""


def load_catalogue(path: Path = CATALOGUE) -> dict[str, Published]:
    """Returns the rows of a catalogue file by name, in their order.

    Raises:
      UserError: the columns are not those of `Published`, or a value or a name is wrong.
    """
    fields = {field.name: field.type for field in dataclasses.fields(Published)}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if list(reader.fieldnames or ()) != list(fields):
            raise UserError(f"{path} has the columns {reader.fieldnames}; expected {list(fields)}")
        catalogue: dict[str, Published] = {}
        for row in reader:
            try:
                published = Published(**{k: _parse(row[k], t) for k, t in fields.items()})
            except (TypeError, ValueError) as e:
                raise UserError(f"{path}, line {reader.line_num}: {e}") from None
            if published.name in catalogue:
                raise UserError(f"{path}, line {reader.line_num}: a second {published.name!r}")
            catalogue[published.name] = published
    return catalogue


def list_models(text: str = "") -> dict[str, str]:
    """Returns a description of each set of published weights, by its name.

    The names are what `init_from`, `load_model` and `--checkpoint` take.

    Args:
      text: only names that contain all of its words, in any case and with any separators, or
        models of this name. For models of the Hugging Face hub they may also be words of the family
        and the licence.
    """
    if not isinstance(text, str):
        raise UserError(f"text={text!r}: expected a part of a name, such as 'B/16'")
    return _list_catalogue(text) | _list_repositories(text)


def count_repositories() -> dict[str, int]:
    """Returns the number of models of the Hugging Face hub that are listed, by their family."""
    return dict(Counter(row.family for row in load_repositories().values()))


def _list_repositories(text: str) -> dict[str, str]:
    words, models = text.lower().split(), {}
    for name, row in load_repositories().items():
        described = f"{name} {row.describe()}".lower()
        folded = fold(described)
        if all(word in described or (fold(word) and fold(word) in folded) for word in words):
            models[name] = row.describe()
    return models


def _list_catalogue(text: str) -> dict[str, str]:
    models, words = {}, text.split()
    for name, model in load_catalogue().items():
        if _is_named(text, name, model) or all(_is_named(word, name, model) for word in words):
            top1 = "" if model.top1 is None else f", ImageNet top-1 {model.top1} %"
            models[name] = f"{model.image_size} px, {model.pretraining}{top1}"
    return models


def _is_named(text: str, name: str, model: Published) -> bool:
    """Whether a text is a part of the name of published weights, or the name of their model."""
    folded = _fold_model(text)
    same = folded and folded in fold(name).replace("+", "")
    return bool(same) or text.lower() in name.lower() or text.lower() == model.model


def is_name(text: str) -> bool:
    """Whether a text has the form of a name, and not of a path or URL."""
    return _NAME.fullmatch(text) is not None


def normalize_name(name: str, catalogue: Iterable[str]) -> str:
    """Returns the name in the catalogue that is meant by another spelling of it.

    Case and separators may differ, and the model may start with "ViT-": `AugReg:ViT-B/16` is
    `augreg:B/16`. A name without a match is returned as it is.
    """
    known = {_fold(other): other for other in catalogue}
    return known.get(_fold(name), name)


def _fold(name: str) -> str:
    collection, _, rest = name.partition(":")
    model, _, pixels = rest.partition("@")
    return f"{collection.lower()}:{_fold_model(model)}@{pixels}"


def _fold_model(text: str) -> str:
    return fold(re.sub("^(vit|mixer)[-_ ]?", "", text.lower())).replace("+", "")


def needs_index(name: str) -> bool:
    """Whether AugReg's index is needed to find the file of a name, such as `augreg:B_16`."""
    collection, _, model = name.partition(":")
    return collection == "augreg" and _INDEXED.fullmatch(model) is not None


def find(name: str, *, catalogue: Mapping[str, Published] | None = None) -> Published:
    """Returns the checkpoint of a name; for a name with `needs_index`, see `select_augreg`.

    Args:
      name: in the catalogue, or `augreg:FILENAME` with or without `.npz`.
      catalogue: rows by name; by default those of the package.

    Raises:
      UserError: the name is unknown; the message has the nearest one.
    """
    catalogue = load_catalogue() if catalogue is None else catalogue
    name = normalize_name(name, catalogue)
    if name in catalogue:
        return catalogue[name]
    collection, _, model = name.partition(":")
    if collection == "augreg" and "-" in model and "/" not in model:
        return _find_augreg(model, catalogue)
    models: dict[str, list[str]] = {}
    for known in catalogue:
        models.setdefault(known.partition(":")[0], []).append(known)
    if collection not in models:
        raise UserError(f"{name!r}: unknown collection {collection!r}{suggest(collection, models)}")
    raise UserError(f"{name!r} is not published{suggest(name, models[collection])}")


def select_augreg(
    index: Path | str, model: str, *, catalogue: Mapping[str, Published] | None = None
) -> Published:
    """Returns the AugReg checkpoint to fine-tune, by the rule of its publishers.

    It is the one with the highest final accuracy on held-out ImageNet-21k among the files that were
    pre-trained on ImageNet-21k for 300 epochs and whose names start with `model`.

    Args:
      index: path or text of the published `index.csv`.
      model: the start of file names, such as `B_16` or `R_Ti_16`, or a whole file name.
      catalogue: as in `find`.

    Raises:
      UserError: no file has such a name, or the index is something else.
    """
    catalogue = load_catalogue() if catalogue is None else catalogue
    if "-" in model:
        return _find_augreg(model, catalogue)
    place = str(index) if isinstance(index, Path) else "the AugReg index"
    accuracies: dict[str, float] = {}
    try:
        text = read_text(index, max_bytes=MAX_TABLE) if isinstance(index, Path) else index
        # A file has a row for each of its fine-tuned ones.
        for row in csv.DictReader(text.splitlines()):
            if row["ds"] == "i21k":
                accuracies[row["filename"]] = float(row["final_val"] or math.nan)
        models = {filename.split("-")[0] for filename in accuracies}
    except (OSError, AttributeError, KeyError, TypeError, ValueError, csv.Error):
        raise UserError(
            f"{place} is not an AugReg index: expected CSV with ds, filename and final_val; "
            "delete it to have it fetched again"
        ) from None
    found = {f: a for f, a in accuracies.items() if f.split("-")[0] == model and not math.isnan(a)}
    if not found:
        raise UserError(f"'augreg:{model}' is not in {place}{suggest(model, models)}")
    return _find_augreg(max(found, key=found.__getitem__), catalogue)


def describe_augreg(filename: str) -> Published:
    """Returns what follows from the name of a file in the AugReg bucket.

    Args:
      filename: such as `Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0`, with or without
        `--imagenet2012-steps_20k-lr_0.03-res_384`, and with or without `.npz`.

    Raises:
      UserError: the name has another form.
    """
    stem = filename.removesuffix(".npz")
    before, dashes, after = stem.partition("--")
    pretrained = re.fullmatch(r"([A-Z]\w*_\d+)-(i1k|i21k)(?:_\d+)?-[\w.-]+", before)
    finetuned = re.fullmatch(r"(\w+)-[\w.-]+-res_(\d+)", after)
    if pretrained is None or (dashes and finetuned is None):
        raise UserError(
            f"'augreg:{filename}' is no AugReg file; expected a name such as "
            "B_16-i21k-300ep-..., or augreg:B/16 for the recommended one"
        )
    *backbone, size, patch = pretrained[1].split("_")
    datasets = [{"i1k": "imagenet2012", "i21k": "imagenet21k"}[pretrained[2]]]
    image_size, preprocess = 224, "decode|resize_small(256)|central_crop(224)"
    if finetuned:
        datasets.append(finetuned[1])
        image_size = int(finetuned[2])
        preprocess = f"decode|resize({image_size})"
    url = f"{AUGREG_FOLDER}{stem}.npz"
    return Published(
        name=f"augreg:{stem}",
        model="vit",
        variant=f"{'+'.join([*backbone, size])}/{patch}",
        image_size=image_size,
        pretraining="+".join(datasets),
        num_classes=_NUM_CLASSES.get(datasets[-1]),
        head="valid",
        mean=0.5,
        std=0.5,
        eval=preprocess,
        licence="Apache-2.0",
        url_gs=url,
        url_https=to_https(url),
        source=AUGREG_INDEX,
    )


def to_https(url: str) -> str:
    """Returns the HTTPS URL of an object in Google storage; other URLs are returned unchanged."""
    if not url.startswith("gs://"):
        return url
    return _GOOGLE_STORAGE + quote(url.removeprefix("gs://"))


def _find_augreg(filename: str, catalogue: Mapping[str, Published]) -> Published:
    """Returns the row of a file, which has more than its name, or else `describe_augreg`."""
    described = describe_augreg(filename)
    rows = (row for row in catalogue.values() if row.url_gs == described.url_gs)
    return next(rows, described)


def _parse(text: str | None, annotation: Any) -> Any:
    if text is None:
        raise ValueError("a cell is missing")
    if annotation is str:
        return text
    if annotation is bool:
        if text not in ("yes", ""):
            raise ValueError(f"{text!r}: expected yes or nothing")
        return text == "yes"
    if not text and annotation in (int | None, float | None):
        return None
    return float(text) if annotation in (float, float | None) else int(text)
