# SPDX-License-Identifier: Apache-2.0
"""TFDS builder `digits_captions`: prepared from the table of `digits`, with no network."""

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

from vit_jax.data.datasets.digits import table
from vit_jax.data.datasets.digits_captions import captions


class Builder(tfds.core.GeneratorBasedBuilder):
    """Digits as PNG images of 12x12x1 with captions.

    `test` has the digits of that split of `digits`, each at one place; `train` and `validation`
    have nine tenths and one tenth of the others. Each digit of `train` is there at all nine places.

    `id` is the row in the published table. TFDS names the data set after this module, and takes
    description and citation from the README.md and CITATIONS.bib beside it.
    """

    VERSION = tfds.core.Version("1.1.0")  # 1.1: nine places in train, a split validation

    def __init__(self, *, file_format: str | None = "array_record", **kwargs: Any):
        """As in TFDS, but with a format that can be read by position and without TensorFlow."""
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        side = captions.CANVAS
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "id": np.int64,
                    "image": tfds.features.Image(shape=(side, side, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=captions.NAMES),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://doi.org/10.24432/C50P49",
            license="CC BY 4.0",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # the table is in the package
        images, labels = table.load_digits()
        images, places = table.to_uint8_range(images), captions.find_places(labels)
        train, test = table.split_indices(labels)
        held_out = np.arange(len(train)) % 10 == 9
        return {
            "train": self._generate_examples(images, labels, train[~held_out], None),
            "validation": self._generate_examples(images, labels, train[held_out], places),
            "test": self._generate_examples(images, labels, test, places),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray, places: np.ndarray | None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields each of the rows at its place, or without places at all of them."""
        for row in rows.tolist():
            label = int(labels[row])
            for place in captions.PLACES if places is None else places[[row]]:
                # TFDS encodes an array with TensorFlow; bytes it stores as they are.
                _, png = cv2.imencode(".png", captions.draw(images[row], place))
                yield (
                    f"{row} {place[0]} {place[1]}",
                    {
                        "id": row,
                        "image": png.tobytes(),
                        "label": label,
                        "captions": list(captions.describe(label, place)),
                    },
                )
