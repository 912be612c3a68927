# SPDX-License-Identifier: Apache-2.0
"""Writes trained models for other programs, which do not need this package."""
