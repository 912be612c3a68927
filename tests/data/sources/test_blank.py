# SPDX-License-Identifier: Apache-2.0
"""Black images with labels, to plan without data."""

import pytest

from vit_jax.data.ops.decode import decode_image
from vit_jax.data.sources import dataset_info, open_source
from vit_jax.utils.errors import UserError


def test_blank_has_the_classes_and_the_size_that_its_name_says():
    info = dataset_info("blank:7,24", data_dir=None)
    assert (info.num_classes, info.image_shape) == (7, (24, 24, 3))
    assert dataset_info("blank:7", data_dir=None).image_shape == (None, None, 3)
    source = open_source("blank:7,24", "train[:8]", data_dir=None, key="data.split")
    assert [int(source[i]["label"]) for i in range(8)] == [0, 1, 2, 3, 4, 5, 6, 0]
    image = decode_image(source[0]["image"])
    assert image.shape == (24, 24, 3)
    assert not image.any()


@pytest.mark.parametrize("name", ["blank:0", "blank:ten", "blank:10,", "blank:10,0"])
def test_another_name_is_refused(name):
    with pytest.raises(UserError, match="expected blank:CLASSES"):
        dataset_info(name, data_dir=None)
