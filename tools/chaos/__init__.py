# SPDX-License-Identifier: Apache-2.0
"""Injects faults into real runs, and says what became of them."""
