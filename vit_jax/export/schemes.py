# SPDX-License-Identifier: Apache-2.0
"""The values of --quantize, apart from what needs JAX."""

from collections.abc import Mapping

WEIGHTS = "int8"
DYNAMIC = "int8_dynamic"
# As they are described to users.
SCHEMES: Mapping[str, str] = {
    WEIGHTS: "int8 weights",
    DYNAMIC: "int8 weights and dynamic uint8 activations",
}
