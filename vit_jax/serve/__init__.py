# SPDX-License-Identifier: Apache-2.0
"""A trained model behind a web page and HTTP."""
