# SPDX-License-Identifier: Apache-2.0
"""The `digits` data set: 1,797 handwritten digits of 8x8 pixels that need no download."""
