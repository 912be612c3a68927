# SPDX-License-Identifier: Apache-2.0
"""Writes how timm changes learning rates and averages, for tests/optim.

python tests/testdata/make_timm_optim_golden.py   (with torch 2.14.1 and timm 1.0.31)

`torch/optim.json` has learning rates of the cosine schedule, decays of the average of parameters,
parameters under LARS, and the factors of layer-wise learning rates.
"""

import json
from pathlib import Path

import timm
import torch
from timm.optim import Lars, param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

# Five updates an epoch, of which there are six; two epochs of warmup.
EPOCHS, UPDATES, WARMUP = 6, 5, 2
LR, MIN_LR, WARMUP_LR = 0.8, 0.1, 0.05
EMA = 0.99
START, GRADIENTS = [[3.0, -4.0]], [[[0.5, 0.1]], [[-0.2, 0.3]], [[0.0, 0.0]], [[1.0, -2.0]]]


def rates(*, on_updates: bool, prefix: bool) -> list[float]:
    """The rate of each update; with `prefix`, epochs of warmup come on top."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        num_epochs=EPOCHS,
        warmup_epochs=WARMUP,
        warmup_lr=WARMUP_LR,
        min_lr=MIN_LR,
        warmup_prefix=prefix,
        step_on_epochs=not on_updates,
        updates_per_epoch=UPDATES,
    )
    found, count = [], 0
    for epoch in range(epochs):
        for _ in range(UPDATES):
            found.append(optimizer.param_groups[0]["lr"])
            count += 1
            scheduler.step_update(num_updates=count)
        scheduler.step(epoch + 1)
    return found


def follow_lars(weight_decay: float) -> list[list[list[float]]]:
    param = torch.nn.Parameter(torch.tensor(START))
    optimizer = Lars([param], lr=0.1, momentum=0.9, weight_decay=weight_decay, trust_coeff=0.02)
    found = []
    for gradient in GRADIENTS:
        param.grad = torch.tensor(gradient)
        optimizer.step()
        found.append(param.tolist())
    return found


def layer_scales() -> dict[str, float]:
    model = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=5)
    names = {id(param): name for name, param in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


def main() -> None:
    average = ModelEmaV3(torch.nn.Linear(1, 1), decay=EMA, use_warmup=True)
    golden = {
        "rates": rates(on_updates=True, prefix=False),
        "rates by epoch": rates(on_updates=False, prefix=False),
        "rates after warmup": rates(on_updates=True, prefix=True),
        "ema": [average.get_decay(update) for update in range(1, 1200)],
        "lars": follow_lars(0.3),
        "lars without decay": follow_lars(0.0),
        "layers": layer_scales(),
    }
    path = Path(__file__).parent / "torch" / "optim.json"
    path.write_text(json.dumps(golden) + "\n")
    print(f"wrote {path}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
