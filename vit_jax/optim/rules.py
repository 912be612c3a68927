# SPDX-License-Identifier: Apache-2.0
"""Which parameters are trained, and how fast: rules by regular expressions on their paths.

Paths are as in `utils.tree`: `Transformer/encoderblock_3/MlpBlock_0/Dense_0/kernel`. An expression
must match the whole path: `head/.*` matches the head, and `head` nothing.
"""

import dataclasses
import difflib
import math
import re
from typing import Any

import jax
import numpy as np

from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten, partition, path_str

# Parameters in blocks, before the blocks and after them. Those of scanned blocks are stacked along
# the first axis, so their path has no block number.
_BLOCK = r"Transformer/encoderblock(?:_(\d+))?/.*"
_BEFORE = (
    r"(embedding|conv_root|gn_root|block\d+)/.*|cls|dist|mask_token|(.*/)?(registers|pos_embedding)"
)
_AFTER = (
    r"(Transformer/encoder_norm|fc_norm|MAPHead_0|pre_logits|head|head_dist|dino_head|ibot_head"
    r"|centers|gram_teacher)/.*"
)

# Parameters that decay by default: no biases, norms, position embeddings and class tokens.
DECAYED = (".*kernel",)


def is_stacked(path: str) -> bool:
    """Returns whether a path is in scanned blocks, so that the first axis is that of layers."""
    return re.search(r"(^|/)encoderblock/", path) is not None


@dataclasses.dataclass(frozen=True)
class ParamRules:
    """Rules for single parameters, see `make_optimizer`.

    Attributes:
      freeze: expressions of parameters that are not trained.
      lr_multipliers: pairs of an expression and a factor; the first match counts.
      layer_decay: factor on the learning rate from one layer to the one before; None for 1.
      decayed: expressions of parameters with weight decay.
      schedules: expressions of parameters with a schedule of their own; the first match counts.
      starts: expressions of parameters that are trained later; the first match counts.
      clip_groups: expressions of parameters whose gradients are clipped together; the first match
        counts.
    """

    freeze: tuple[str, ...] = ()
    lr_multipliers: tuple[tuple[str, float], ...] = ()
    layer_decay: float | None = None
    decayed: tuple[str, ...] = DECAYED
    schedules: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()
    clip_groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, patterns in self._patterns().items():
            for pattern in patterns:
                _check_regex(pattern, key=f"optimizer.{key}")
        for pattern, factor in self.lr_multipliers:
            if factor == 0:
                raise UserError(
                    f"optimizer.lr_multipliers: {pattern!r} has factor 0; expected above 0: "
                    "parameters that stay as they are belong in optimizer.freeze"
                )
            if not 0 < factor < math.inf:
                raise UserError(
                    f"optimizer.lr_multipliers: {pattern!r} has factor {factor}; expected above 0"
                )
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UserError(
                f"optimizer.layer_decay={self.layer_decay}: expected 0 < value <= 1, or None"
            )

    def check(self, params: Any) -> None:
        """Checks the rules against the parameters of a model (arrays or shapes).

        Raises `UserError` if an expression matches nothing, if no parameter is left to train, or if
        a layer decay is given for a model with unknown layers.
        """
        paths, trained = list(flatten(params)), list(flatten(self.split(params)[0]))
        if not trained:
            raise UserError(
                f"optimizer.freeze={self.freeze} matches all {len(paths)} parameters; expected "
                "some to be left to train, as by '(?!head/).*'"
            )
        for key, patterns in self._patterns().items():
            matched, what = trained, "parameter that is trained" if self.freeze else "parameter"
            if key in ("freeze", "weight_decay_params"):
                matched, what = paths, "parameter"
            is_default = key == "weight_decay_params" and patterns == DECAYED
            for pattern in () if is_default else patterns:
                _check_match(pattern, matched, key=f"optimizer.{key}", what=what)
        self.lr_factors(params)

    def _patterns(self) -> dict[str, tuple[str, ...]]:
        """All expressions, by their key in the config."""
        return {
            "freeze": self.freeze,
            "lr_multipliers": tuple(pattern for pattern, _ in self.lr_multipliers),
            "schedules": self.schedules,
            "train_after": self.starts,
            "grad_clip_groups": self.clip_groups,
            "weight_decay_params": self.decayed,
        }

    def decay_mask(self, params: Any) -> Any:
        """Returns a tree like `params` of bools: whether weight decay applies."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: any(re.fullmatch(p, path_str(path)) for p in self.decayed), params
        )

    def schedule_index(self, path: str) -> int | None:
        """Returns the index of a parameter's schedule in `schedules`; None for the common one."""
        return _first_match(self.schedules, path)

    def start_index(self, path: str) -> int | None:
        """Returns the index in `starts` of a parameter; None for one that is trained at once."""
        return _first_match(self.starts, path)

    def clip_group(self, path: str) -> int | None:
        """Returns the index of a parameter's group in `clip_groups`; None for the common one."""
        return _first_match(self.clip_groups, path)

    def split(self, params: Any) -> tuple[Any, Any]:
        """Splits a tree of parameters into trained and frozen ones, see `tree.partition`."""
        if not self.freeze:
            return params, {}
        return partition(params, lambda path: not any(re.fullmatch(p, path) for p in self.freeze))

    def lr_factors(self, params: Any) -> dict[str, Any]:
        """Returns the factor on the learning rate of each parameter by path; empty if all are 1.

        The factors of scanned blocks are arrays, float32 `[num_layers, 1, ...]`.
        """
        if not self.lr_multipliers and self.layer_decay is None:
            return {}
        leaves = flatten(params)
        layers = layer_decay_factors(leaves, self.layer_decay) if self.layer_decay else {}
        factors = {}
        for path in leaves:
            matches = (float(f) for p, f in self.lr_multipliers if re.fullmatch(p, path))
            factors[path] = next(matches, 1.0) * layers.get(path, 1.0)
        return factors


def layer_decay_factors(leaves: dict[str, Any], decay: float) -> dict[str, Any]:
    """Returns factors on the learning rate that fall by `decay` per layer from the output.

    In a ViT with L blocks the embedding and its tokens have decay^(L+1), block i from 0 to L-1 has
    decay^(L-i), and everything after the blocks 1. Source: arXiv:2106.08254 (BEiT), as in
    fine-tuning of arXiv:2111.06377 (MAE).

    Takes parameters (arrays or shapes) by path. Returns factors by path: floats, or for scanned
    blocks float32 arrays `[L, 1, ...]`. Raises `UserError` if the layer of a parameter is unknown.
    """
    blocks = {path: match[1] for path in leaves if (match := re.fullmatch(_BLOCK, path))}
    depths = (leaves[path].shape[0] if i is None else int(i) + 1 for path, i in blocks.items())
    depth = max(depths, default=0)
    factors: dict[str, Any] = {}
    for path, leaf in leaves.items():
        if path in blocks:
            if blocks[path] is None:
                powers = decay ** np.arange(depth, 0, -1, dtype=np.float64)
                factors[path] = powers.astype(np.float32).reshape(-1, *(1,) * (leaf.ndim - 1))
            else:
                factors[path] = decay ** (depth - int(blocks[path]))
        elif re.fullmatch(_BEFORE, path):
            factors[path] = decay ** (depth + 1)
        elif re.fullmatch(_AFTER, path):
            factors[path] = 1.0
        else:
            raise UserError(
                f"optimizer.layer_decay={decay}: the layer of {path} is not known; expected the "
                "parameters of a ViT: leave layer_decay out for this model"
            )
    return factors


def _first_match(patterns: tuple[str, ...], path: str) -> int | None:
    return next((i for i, p in enumerate(patterns) if re.fullmatch(p, path)), None)


def _check_regex(pattern: str, *, key: str) -> None:
    try:
        re.compile(pattern)
    except re.error as e:
        raise UserError(f"{key}: {pattern!r} is not a regular expression: {e}") from None


def _check_match(pattern: str, paths: list[str], *, key: str, what: str) -> None:
    if any(re.fullmatch(pattern, path) for path in paths):
        return
    # Most likely a partial match was meant: `head` for `head/.*`.
    near = [path for path in paths if re.search(pattern, path)]
    text = re.sub(r"[^\w/]+", "", pattern)
    near = near or difflib.get_close_matches(text, paths, n=3, cutoff=0)
    raise UserError(
        f"{key}: {pattern!r} matches no {what}; expected an expression for whole paths, such as "
        f"{', '.join(near[:3])}"
    )
