# SPDX-License-Identifier: Apache-2.0
"""Flax Linen models; pure functions of parameters and images."""
