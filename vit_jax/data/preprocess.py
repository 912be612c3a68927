# SPDX-License-Identifier: Apache-2.0
"""Preprocessing as one readable line: `decode|inception_crop(224)|flip_lr`."""

from vit_jax.data.calls import parse_call
from vit_jax.data.ops import corruptions, patches, policies, transforms
from vit_jax.data.ops.transforms import Op

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


def _parse_op(text: str, *, key: str) -> Op:
    return parse_call(text, OPS, key=key, what="operation", elsewhere=_ELSEWHERE)
