# SPDX-License-Identifier: Apache-2.0
"""Leaf helpers: errors, name resolution, parameter trees."""
