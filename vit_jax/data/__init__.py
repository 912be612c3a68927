# SPDX-License-Identifier: Apache-2.0
"""Input pipelines: sources, preprocessing, order. Nothing here imports jax."""
