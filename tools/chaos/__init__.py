# SPDX-License-Identifier: Apache-2.0
"""Injects faults into real runs, and reports the results."""
