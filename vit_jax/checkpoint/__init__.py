# SPDX-License-Identifier: Apache-2.0
"""Saving, resuming and importing parameters."""
