# SPDX-License-Identifier: Apache-2.0
"""Options of XLA by device, and that they make way for those of the environment."""

import types

import jax

from vit_jax.runtime.compiler_options import compiler_options

GPU = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA Test", compute_capability="9.0")
OTHER = types.SimpleNamespace(platform="rocm", device_kind="other", compute_capability="gfx942")


def test_only_nvidia_gpus_have_options_and_the_environment_goes_first(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert compiler_options(jax.devices("cpu")[0]) == compiler_options(OTHER) == {}
    options = compiler_options(GPU)
    assert options["xla_gpu_enable_cublaslt"] is True
    assert options["xla_gpu_enable_triton_gemm"] is False
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_gpu_enable_triton_gemm=true")
    del options["xla_gpu_enable_triton_gemm"]
    assert compiler_options(GPU) == options
