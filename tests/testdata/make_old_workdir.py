# SPDX-License-Identifier: Apache-2.0
"""Writes `old_workdir/`: a run that old code began, and the parameters with which it ends it.

It runs in a checkout of commit 8b3d310, with the packages of `requirements.lock` for Python 3.11
and with the flags of `tests/conftest.py`:

PYTHONPATH=$PWD XLA_FLAGS=--xla_cpu_use_fusion_emitters=false python PATH/TO/make_old_workdir.py

`workdir/` is what SIGTERM leaves at step 4 of 8. `params.npz` holds the parameters and their moving
average (float32) at step 4 and at step 8, to which the same code continues. The files stay as they
are: they show that later code resumes what this code began.
"""

import contextlib
import os
import shutil
import signal
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent / "old_workdir"
CONFIG = {
    "total_steps": 8,
    "model": {"patch_size": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16},
    "data": {
        "name": "digits",
        "split": "train",
        "preprocess": "decode|random_shift(1)",
        "batch_size": 16,
        "data_dir": "data",
    },
    # An eps far above the rounding errors of gradients, which Adam would scale to whole updates
    # where the true gradient is 0, as that of the bias of keys is.
    "optimizer": {"lr": 1e-2, "warmup_steps": 2, "weight_decay": 0.1, "eps": 1e-3},
    "ema_decay": 0.5,
    "evals": {"val": {"split": "test[:50]", "preprocess": "decode", "every": 2}},
    "checkpoint": {"every": 4},
    "log_every": 2,
    "tracking": {"trackers": (), "images": 0},
}


def main() -> None:
    """Trains in a temporary folder, and replaces `old_workdir/`."""
    import tests.conftest  # noqa: F401, I001 (sets devices and flags before jax is imported)
    import numpy as np
    from ml_collections import ConfigDict
    from vit_jax import train as train_module
    from vit_jax.checkpoint.manager import list_steps, load_params
    from vit_jax.data.sources import open_source
    from vit_jax.parallel.preemption import Preempted
    from vit_jax.utils.tree import flatten

    class StoppedMonitor(train_module.Monitor):
        def step(self, step, metrics, *, log):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            super().step(step, metrics, log=log)

    def read_arrays(step: int) -> dict[str, np.ndarray]:
        """Parameters and average by `STEP/ITEM/PATH`."""
        arrays = {}
        for item in ("params", "ema_params"):
            params, _ = load_params(Path("workdir/checkpoints", str(step)), item=item)
            arrays |= {f"{step}/{item}/{k}": np.asarray(v) for k, v in flatten(params).items()}
        return arrays

    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        open_source("digits", "train", data_dir="data", key="split")
        monitor, train_module.Monitor = train_module.Monitor, StoppedMonitor
        with contextlib.suppress(Preempted):
            train_module.train(ConfigDict(CONFIG), "workdir", command="python -m vit_jax.main")
        train_module.Monitor = monitor
        assert list_steps(Path("workdir")) == [4]
        shutil.rmtree(FOLDER, ignore_errors=True)
        # Both are rewritten by a run that resumes.
        derived = shutil.ignore_patterns("report.html", "tensorboard")
        shutil.copytree("workdir", FOLDER / "workdir", ignore=derived)
        arrays = read_arrays(4)
        train_module.train(ConfigDict(CONFIG), "workdir")
        arrays |= read_arrays(8)
    np.savez_compressed(FOLDER / "params.npz", **arrays)


if __name__ == "__main__":
    main()
