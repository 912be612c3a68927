# SPDX-License-Identifier: Apache-2.0
"""The `digits_masks:SIZE` data set: digits pasted on backgrounds, with their masks, by rule."""
