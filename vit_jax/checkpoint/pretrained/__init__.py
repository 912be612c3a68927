# SPDX-License-Identifier: Apache-2.0
"""Published weights: read a file (`npz`), make it fit a model (`adapt`, `posemb`)."""
