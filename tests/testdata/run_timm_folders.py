# SPDX-License-Identifier: Apache-2.0
"""Loads folders of `vit_jax.export` by timm and transformers, for `tests/test_torch.py`.

  python tests/testdata/run_timm_folders.py PLACE NAME ...

PLACE/NAME is such a folder, and PLACE/images holds images. PLACE/NAME/timm.json gets what timm and
transformers compute for these, prepared as timm prepares them, and the names of the classes.
"""

import json
import sys
from pathlib import Path

import timm
import torch
from PIL import Image
from transformers import AutoModelForImageClassification


def main(place: Path, names: list[str]) -> None:
    pictures = [Image.open(path).convert("RGB") for path in sorted((place / "images").iterdir())]
    for name in names:
        folder = place / name
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        options = timm.data.resolve_model_data_config(model)
        prepare = timm.data.create_transform(**options, is_training=False)
        images = torch.stack([prepare(picture) for picture in pictures])
        with torch.no_grad():
            if not model.num_classes:
                found = {"features": model.forward_features(images)[:, 0].tolist()}
            else:
                other = AutoModelForImageClassification.from_pretrained(folder).eval()
                found = {
                    "timm": model(images).tolist(),
                    "names": model.pretrained_cfg["label_names"],
                    "transformers": other(images).logits.tolist(),
                    "id2label": other.config.id2label,
                }
        (folder / "timm.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
