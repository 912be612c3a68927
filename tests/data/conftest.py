# SPDX-License-Identifier: Apache-2.0
"""What several tests of the data share."""

import pytest

from vit_jax.data.sources import open_source


@pytest.fixture(scope="session")
def stripes_dir(tmp_path_factory):
    """A TFDS folder with `stripes` prepared."""
    folder = str(tmp_path_factory.mktemp("stripes"))
    open_source("stripes", "train", data_dir=folder, key="data.split")
    return folder
