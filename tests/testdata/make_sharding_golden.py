# SPDX-License-Identifier: Apache-2.0
"""Writes where each parameter of the presets lies, under three meshes, to `sharding/`.

python -m tests.testdata.make_sharding_golden

Read the difference after a change of the rules.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from vit_jax.models.variants import make_mixer, make_vit
from vit_jax.parallel.mesh import AXES
from vit_jax.parallel.sharding import Strategy, param_spec
from vit_jax.utils.tree import flatten

FOLDER = Path(__file__).parent / "sharding"
PRESETS = {
    "vit_s16": (make_vit, "S/16"),
    "vit_b16": (make_vit, "B/16"),
    "vit_l16": (make_vit, "L/16"),
    "vit_h14": (make_vit, "H/14"),
    "vit_g14": (make_vit, "g/14"),
    "vit_gg14": (make_vit, "G/14"),
    "vit_r50_b16": (make_vit, "R50+B/16"),
    "mixer_b16": (make_mixer, "B/16"),
}
MESHES = {
    "data=8, zero1": ((8, 1, 1), Strategy(zero1=True)),
    "fsdp=8": ((1, 8, 1), Strategy()),
    "data=2, fsdp=4, tensor=2": ((2, 4, 2), Strategy()),
}


def render(preset: str) -> str:
    """A line for each parameter; those of all blocks alike stand once."""
    make, variant = PRESETS[preset]
    # Blocks are alike, so two of them tell.
    model = make(variant=variant, num_classes=1000, num_layers=2)
    image = jnp.zeros((1, 224, 224, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False)["params"])
    lines = [
        f"# {variant}, 1000 classes, images of 224. After the shape: " + "; ".join(MESHES),
        "# (the first of optimizer state, whose parameters are whole; the others of both)",
    ]
    seen = set()
    for path, leaf in flatten(shapes).items():
        name = re.sub(r"(encoderblock|MixerBlock)_\d+", r"\1_*", path)
        specs = []
        for sizes, strategy in MESHES.values():
            mesh = AbstractMesh(sizes, AXES)
            spec = param_spec(f"opt_state/{path}", leaf.shape, mesh, strategy)
            specs.append(",".join(_text(axis) for axis in spec))
        line = f"{name} {'x'.join(map(str, leaf.shape))}: {'; '.join(specs)}"
        if line not in seen:
            seen.add(line)
            lines.append(line)
    return "\n".join(lines) + "\n"


def _text(axis: str | tuple[str, ...] | None) -> str:
    return "-" if axis is None else axis if isinstance(axis, str) else "+".join(axis)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for preset in PRESETS:
        (FOLDER / f"{preset}.txt").write_text(render(preset))
