# SPDX-License-Identifier: Apache-2.0
"""Writes what every config in configs/ comes to, as text that a test compares.

python -m tools.config_dumps

Of each, with its default arguments: preprocessing, all parameters with their shapes, where they lie
on a mesh, and how they are trained, and the first learning rates. Only shapes are computed. A
change of these files should be one that was meant.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AbstractMesh

from vit_jax.config.load import load_config
from vit_jax.optim.summary import ParamSummary, describe_rates, summarize_params
from vit_jax.parallel.sharding import param_spec
from vit_jax.training.experiment import Experiment
from vit_jax.utils.errors import UserError

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
DUMPS = ROOT / "tests" / "testdata" / "configs"

# In place of data that is not available.
EPOCH_EXAMPLES = 50_000
# The first mesh that can hold a model is taken: three heads can't be split in two.
MESHES = ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 4, "fsdp": 2, "tensor": 1})
RATES = 20


def dump_config(file: Path, *, data_dir: str) -> str:
    """The text of one config; `data_dir` is where the digits are or will be prepared."""
    overrides = {"data.data_dir": data_dir}
    config = load_config(str(file), overrides)
    kind = str(config.to_dict()["data"].get("name")).partition(":")[0]
    others = {"folder": "digits", "pairs": "digits_captions", "masks": "digits_masks:64"}
    if other := others.get(kind):
        config = load_config(str(file), overrides | {"data.name": other})
    experiment = Experiment.from_config(
        config, devices=jax.devices()[:1], epoch_examples=EPOCH_EXAMPLES
    )
    optimizer = experiment.optimizer
    rows = summarize_params(optimizer, experiment.abstract_state.params)
    mesh, specs = _shard(rows)
    steps = range(min(RATES, experiment.total_steps))
    rates = " ".join(f"{np.asarray(optimizer.schedule(step)):.4g}" for step in steps)
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.items())
    return "\n".join(
        [
            f"{experiment.total_steps} steps of {experiment.train_data.batch_size}",
            f"images: {experiment.train_data.preprocess}",
            *(
                f"views: {count} {name}: {line}"
                for name, count, line in experiment.train_data.views
            ),
            *(f"images of {e.name}: {e.data.preprocess}" for e in experiment.evaluators),
            *describe_rates(optimizer),
            f"first learning rates: {rates}",
            "",
            f"parameter, shape, dimensions on {sizes}, weight decay, learning rate",
            *_collapse([(row.path, _describe(row, specs[row.path])) for row in rows]),
            "",
        ]
    )


def _shard(rows: list[ParamSummary]) -> tuple[dict[str, int], dict[str, str]]:
    """The mesh, and how each parameter is sharded over it: an axis or - for each dimension."""
    for sizes in MESHES:
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        try:
            specs = {row.path: param_spec(row.path, row.shape, mesh) for row in rows}
        except UserError:
            continue
        return sizes, {path: " ".join(axis or "-" for axis in spec) for path, spec in specs.items()}
    raise AssertionError("no mesh fits")


def _describe(row: ParamSummary, spec: str) -> str:
    least, most = row.lr_factors
    factor = f"x{least:.4g}" if least == most else f"x{least:.4g}..{most:.4g}"
    parts = [
        "x".join(map(str, row.shape)),
        f"({spec})",
        "decay" if row.decayed else "no decay",
        "frozen" if row.frozen else factor,
        row.schedule or "",
    ]
    return "  ".join(filter(None, parts))


def _collapse(lines: list[tuple[str, str]]) -> Iterator[str]:
    """Equal lines of blocks with successive numbers become one: `encoderblock_{0..11}`."""
    numbered = re.compile(r"(?<=Block_|block_)\d+(?=/)")
    groups: dict[tuple[str, str], list[int]] = {}
    for path, text in lines:
        match = numbered.search(path)
        numbers = groups.setdefault((numbered.sub("{}", path, count=1), text), [])
        if match:
            numbers.append(int(match[0]))
    for (path, text), numbers in groups.items():
        for name in _name_ranges(sorted(numbers)) or [""]:
            yield f"{path.replace('{}', name)}  {text}"


def _name_ranges(numbers: list[int]) -> list[str]:
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return [str(a) if a == b else f"{{{a}..{b}}}" for a, b in ranges]


def main() -> None:
    """Writes all dumps, and removes those of configs that are no more."""
    DUMPS.mkdir(parents=True, exist_ok=True)
    for old in DUMPS.glob("*.txt"):
        old.unlink()
    with tempfile.TemporaryDirectory() as data_dir:
        for file in sorted(CONFIGS.glob("*.py")):
            target = DUMPS / f"{file.stem}.txt"
            target.write_text(dump_config(file, data_dir=data_dir))
            print(f"wrote {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
