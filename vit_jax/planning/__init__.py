# SPDX-License-Identifier: Apache-2.0
"""What a run will need and how fast it can be, before there are devices for it."""
