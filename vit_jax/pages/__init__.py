# SPDX-License-Identifier: Apache-2.0
"""The HTML pages that the commands write."""
