# SPDX-License-Identifier: Apache-2.0
"""Inference with trained models: predictions, features and figures."""
