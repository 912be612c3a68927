# SPDX-License-Identifier: Apache-2.0
"""Distributed training of Vision Transformers in JAX."""

__version__ = "0.1.0"
