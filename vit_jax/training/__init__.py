# SPDX-License-Identifier: Apache-2.0
"""Training: the parts of a run, its step, its loop."""
