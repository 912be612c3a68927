# SPDX-License-Identifier: Apache-2.0
"""Published models that the Hugging Face hub stores: `repositories.csv` has one row for each.

Their names are those of `fetch_repository`: `timm:NAME` and `hf:USER/NAME`. The hub has more models
of the same architectures, such as fine-tuned ones. `tools/hub_catalogue.py` writes the file.
"""

import csv
import dataclasses
import functools
from pathlib import Path

from vit_jax.utils.errors import UserError
from vit_jax.utils.suggestions import find_near

REPOSITORIES = Path(__file__).with_name("repositories.csv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repository:
    """One published model of the hub; unknown values are None.

    Attributes:
      name: `timm:NAME` or `hf:USER/NAME`.
      family: the project or the method that the weights are of, such as "DINOv2".
      image_size: (height, width) in pixels of its images.
      num_classes: outputs of the head: classes, or the width of an embedding; 0 without a head.
      million_params: parameters of the model, in millions.
      licence: of the weights, as timm or their page names it.
      top1: ImageNet accuracy in percent in timm's table of results.
      top1_image_size: height and width at which `top1` was measured.
    """

    name: str
    family: str
    image_size: tuple[int, int]
    num_classes: int
    million_params: float
    licence: str
    top1: float | None = None
    top1_image_size: int | None = None

    def describe(self) -> str:
        """Returns what a list of models prints behind the name."""
        size = "x".join(map(str, dict.fromkeys(self.image_size)))
        top1 = "" if self.top1 is None else f", ImageNet top-1 {self.top1} %"
        return f"{size} px, {self.family}, {self.million_params} M, {self.licence}{top1}"


def write_repositories(rows: list[Repository], path: Path = REPOSITORIES) -> None:
    """Writes a file that `load_repositories` reads."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(Repository))
        for row in rows:
            values = dataclasses.astuple(row)
            cells = ("x".join(map(str, x)) if isinstance(x, tuple) else x for x in values)
            writer.writerow("" if x is None else x for x in cells)


@functools.cache
def load_repositories(path: Path = REPOSITORIES) -> dict[str, Repository]:
    """Returns the rows of a file by name, in their order.

    Raises:
      UserError: the columns are not those of `Repository`, or a value or a name is wrong.
    """
    fields = [field.name for field in dataclasses.fields(Repository)]
    found: dict[str, Repository] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if list(reader.fieldnames or ()) != fields:
            raise UserError(f"{path} has the columns {reader.fieldnames}; expected {fields}")
        for row in reader:
            try:
                height, width = map(int, row["image_size"].split("x"))
                repository = Repository(
                    name=row["name"],
                    family=row["family"],
                    image_size=(height, width),
                    num_classes=int(row["num_classes"]),
                    million_params=float(row["million_params"]),
                    licence=row["licence"],
                    top1=float(row["top1"]) if row["top1"] else None,
                    top1_image_size=int(row["top1_image_size"]) if row["top1"] else None,
                )
            except (TypeError, ValueError, AttributeError) as e:
                raise UserError(f"{path}, line {reader.line_num}: {e}") from None
            if repository.name in found:
                raise UserError(f"{path}, line {reader.line_num}: a second {repository.name!r}")
            found[repository.name] = repository
    return found


def suggest_repositories(name: str, *, cutoff: float = 0.6) -> list[str]:
    """Returns up to three names of the list that another text may mean.

    These are the weights of an architecture that is named without the tag of its weights or
    without `timm:`, or else the nearest name, by the `cutoff` of `find_near`.
    """
    known = load_repositories()
    if name in known:
        return []
    text = name.partition("@")[0].lower()
    bare = {other: other.partition(":")[2].lower() for other in known}
    wanted = text.partition(":")[2] or text
    found = [o for o, rest in bare.items() if wanted in (rest, *rest.split("/")[1:])]
    # The weights of an architecture without a tag: those of the highest accuracy first.
    of_architecture = [o for o, rest in bare.items() if rest.partition(".")[0] == wanted]
    of_architecture.sort(key=lambda o: -(known[o].top1 or 0))
    found += [o for o in of_architecture if o not in found]
    if not found:
        near = find_near(wanted, bare.values(), cutoff=cutoff)
        found = [o for o, rest in bare.items() if rest == near]
    return found[:3]
