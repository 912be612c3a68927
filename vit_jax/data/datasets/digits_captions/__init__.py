# SPDX-License-Identifier: Apache-2.0
"""The `digits_captions` data set: the digits at nine places of a canvas, with captions by rule."""
