# SPDX-License-Identifier: Apache-2.0
"""What is minimised: a model, a loss and on-device augmentation."""
