# SPDX-License-Identifier: Apache-2.0
"""The layers of a transformer in NumPy, as a reference."""

import numpy as np


def dense(x, params):
    return np.asarray(x) @ params["kernel"] + params["bias"]


def normalise(x, params, epsilon=1e-6):
    x = np.asarray(x)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return x * params["scale"] + params["bias"]


def attend(query, key, value):
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, value)


def project(x, params, name):
    return np.einsum("bld,dhk->blhk", x, params[name]["kernel"]) + params[name]["bias"]
