# SPDX-License-Identifier: Apache-2.0
"""The keys of a config, and what it is made into."""
