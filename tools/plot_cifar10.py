# SPDX-License-Identifier: Apache-2.0
"""Draws the curve of `benchmarks/results/cifar10.json` for the documentation.

pip install matplotlib && python -m tools.plot_cifar10
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cifar10.json"
PICTURE = ROOT / "docs" / "images" / "cifar10.png"


def main() -> None:
    """Reads the results, writes the picture."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for name in ("train/loss", "val/loss"):
        left.plot(*zip(*results["curves"][name], strict=True), label=name)
    left.set(xlabel="step", ylabel="loss")
    left.legend()
    steps, accuracies = zip(*results["curves"]["val/top1"], strict=True)
    right.plot(steps, [100 * a for a in accuracies], marker=".", label="val")
    right.axhline(
        100 * results["test_top1"], color="gray", linestyle="--", label="test, at the end"
    )
    right.set(xlabel="step", ylabel="top-1 accuracy, %")
    right.legend()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
