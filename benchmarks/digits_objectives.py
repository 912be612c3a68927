# SPDX-License-Identifier: Apache-2.0
"""Test accuracy on digits of each objective, the mean over seeds.

    python -m benchmarks.digits_objectives --json benchmarks/results/digits_objectives.json

For each seed, one after the other: labels alone (`digits.py`); a masked autoencoder, fine-tuned
and by linear probes (`digits_mae.py`, `digits_probe.py`); a small student alone, and the same
student distilled from the model of `digits.py` (`digits_distill.py`). The head of the probes is the
one that is best on `val`. A seed takes about ten minutes on two cores. A run that ended is not
repeated with the same --keep.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.environment import write_results
from vit_jax.observe.summary import last_results

# By name: the config and its argument, where {} is the folder of a seed. Later runs start from
# earlier ones.
RUNS = {
    "supervised": "digits.py",
    "mae": "digits_mae.py",
    "mae_finetuned": "digits_mae.py:{}/mae",
    "mae_probed": "digits_probe.py:{}/mae",
    "student_alone": "digits_distill.py:none",
    "student_distilled": "digits_distill.py:{}/supervised",
}


def train(name: str, seed: int, folder: Path) -> dict[str, float]:
    """Runs the command; accuracy on test as a fraction, or the autoencoder's loss."""
    workdir = folder / name
    config = f"configs/{RUNS[name].format(folder)}"
    command = [sys.executable, "-m", "vit_jax.main", f"--config={config}", f"--workdir={workdir}"]
    subprocess.run([*command, f"--config.seed={seed}"], check=True)
    results = last_results(workdir)
    if name == "mae":
        return {"test_loss": results["test/loss"]}
    key = "top1"
    if name == "mae_probed":
        heads = [k.removeprefix("val/") for k in results if k.startswith("val/x") and "top1" in k]
        key = max(heads, key=lambda head: results[f"val/{head}"])
    return {"test_top1": results[f"test/{key}"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the runs here")
    args = parser.parse_args()

    runs: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in args.seeds:
            folder = (args.keep or Path(temporary)).absolute() / f"seed{seed}"
            for name in RUNS:
                runs[name].append({"seed": seed} | train(name, seed, folder))
    means = {}
    for name, of_seeds in runs.items():
        scores = [run["test_top1"] for run in of_seeds if "test_top1" in run]
        if scores:
            means[name] = statistics.mean(scores)
            span = f"{min(scores):.2%} to {max(scores):.2%} over {len(scores)} seeds"
            print(f"{name:<18} mean {means[name]:.2%}, {span}")
    if args.json:
        write_results(args.json, {"means": means, "runs": runs}, "jax", "flax", "optax")


if __name__ == "__main__":
    main()
