# SPDX-License-Identifier: Apache-2.0
"""Preprocessing as one readable line: `decode|inception_crop(224)|flip_lr`."""

from vit_jax.data.calls import parse_call
from vit_jax.data.ops import corruptions, patches, policies, transforms
from vit_jax.data.ops.transforms import Op, Random

OPS = transforms.OPS | policies.OPS | corruptions.OPS | patches.OPS

# Operations of other projects that this one does not run on the host.
_PIXELS = "images stay uint8 up to the device; set objective.pixel_mean and objective.pixel_std"
_LABELS = "labels become one-hot on the device, by the objective"
_ELSEWHERE = {
    "normalize": _PIXELS,
    "value_range": _PIXELS,
    "vgg_value_range": _PIXELS,
    "one_hot": _LABELS,
    "onehot": _LABELS,
    "random_erasing": "it runs on the device; set objective.random_erasing",
    "mixup": "it runs on the device; set objective.mixup",
    "cutmix": "it runs on the device; set objective.cutmix",
}


def parse_preprocess(text: str, *, key: str) -> tuple[Op, ...]:
    """Turns `op(args)|op|...` into operations. Arguments are literals; nothing is evaluated.

    Args:
      text: operations in the order in which they run.
      key: the config key of the text, for errors.

    Raises:
      UserError: an unknown operation or argument; the error quotes the operation.
    """
    return tuple(_parse_op(part.strip(), key=key) for part in text.split("|"))


def without_random(text: str, *, key: str) -> str:
    """Returns a line without random operations.

    A random crop becomes the central one, and a crop of a random scale the whole image at its size.

    Args:
      text: a line, see `parse_preprocess`.
      key: the config key of the text, for errors.
    """
    parts = ((part.strip(), _parse_op(part.strip(), key=key)) for part in text.split("|"))
    kept = (_find_counterpart(op) if isinstance(op, Random) else part for part, op in parts)
    return "|".join(part for part in kept if part is not None)


def _find_counterpart(op: Random) -> str | None:
    """The operation that gives images of the same size without random choices; None for none."""
    match op:
        case transforms.RandomCrop():
            return f"central_crop({op.height}, {op.width or op.height})"
        case transforms.RandomScale():
            return f"resize_small({op.size}, {op.method!r})"
        case transforms.InceptionCrop():
            return f"resize({op.size}, method={op.method!r})"
        case patches.InceptionPatches():
            return f"patches({op.size}, {op.budget}, {op.method!r})"
    return None


def _parse_op(text: str, *, key: str) -> Op:
    return parse_call(text, OPS, key=key, what="operation", elsewhere=_ELSEWHERE)
