# SPDX-License-Identifier: Apache-2.0
"""Trained models in use: predictions, features, and pictures of what they see."""
