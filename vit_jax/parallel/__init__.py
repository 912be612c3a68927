# SPDX-License-Identifier: Apache-2.0
"""Device meshes, and the sharding of parameters and batches."""
