# SPDX-License-Identifier: Apache-2.0
"""Learning rate by weight decay for `configs/digits.py`: six short runs, to choose on `val`.

python -m vit_jax.sweep --config=configs/digits.py --sweep=configs/sweeps/digits.py \
    --workdir=runs/digits_sweep --config.total_steps=1000 --config.evals.test=None

Takes about three minutes on two CPU cores.
"""


def get_sweep():
    return {"optimizer.lr": [1e-3, 2e-3, 4e-3], "optimizer.weight_decay": [0.1, 0.5]}
