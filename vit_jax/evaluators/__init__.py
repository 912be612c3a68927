# SPDX-License-Identifier: Apache-2.0
"""Exact metrics over whole splits, on any number of devices."""
