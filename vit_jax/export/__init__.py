# SPDX-License-Identifier: Apache-2.0
"""Trained models for other programs: files that need nothing of this package."""
