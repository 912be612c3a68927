# SPDX-License-Identifier: Apache-2.0
"""How fast parts of a run are on this machine: `python -m vit_jax.benchmark PART`."""
