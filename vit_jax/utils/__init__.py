# SPDX-License-Identifier: Apache-2.0
"""Helpers that import nothing else of the package."""
