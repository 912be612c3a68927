# SPDX-License-Identifier: Apache-2.0
"""The training steps that `benchmarks.step` compares; each is run in a process of its own.

    python benchmarks/step_peers.py PEER VARIANT BATCH_SIZE

After the line "ready", each line that is read from stdin is a number of seconds; for each, a line
of JSON is written. All take forward and backward pass and AdamW of a ViT at 224x224 with 1,000
classes, in float32 on a CPU and in bfloat16 on an accelerator, on a batch that is in the device's
memory. This file imports only what its peer needs.
"""

import json
import os
import resource
import sys
import time

BEGIN = time.perf_counter()
SIZE, CLASSES = 224, 1000
# Width, layers, heads; MLPs are four times as wide.
VARIANTS = {
    "Ti/16": (192, 12, 3),
    "S/16": (384, 12, 6),
    "B/16": (768, 12, 12),
    "L/16": (1024, 24, 16),
}


def vit_jax(variant, batch_size):
    import jax

    from vit_jax.benchmark.step import make_batch
    from vit_jax.experiment import Experiment
    from vit_jax.parallel.cpu_devices import count_cpu_devices, set_cpu_devices

    jax.config.update("jax_enable_compilation_cache", False)
    config = {
        "total_steps": 1000,
        "model": {"name": "vit", "variant": variant},
        "data": {
            "name": f"blank:{CLASSES},{SIZE}",
            "split": "train",
            "preprocess": "decode",
            "batch_size": batch_size,
        },
        "optimizer": {"name": "adamw", "lr": 1e-3, "schedule": "constant"},
    }
    set_cpu_devices(count_cpu_devices(config))  # as the commands do
    config["precision"] = jax_dtype()
    experiment = Experiment.from_config(config)
    state, batch = experiment.init_state(), make_batch(experiment)

    def step():
        nonlocal state
        state, metrics = experiment.train_step(state, batch)
        return metrics

    return step, jax.block_until_ready


def flax_plain(variant, batch_size):
    """As a user of Flax would write it first."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    width, layers, heads = VARIANTS[variant]
    dtype = jnp.dtype(jax_dtype())

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.LayerNorm(dtype=dtype)(x)
            x = x + nn.MultiHeadDotProductAttention(heads, dtype=dtype)(y, y)
            y = nn.Dense(4 * width, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x))
            return x + nn.Dense(width, dtype=dtype)(nn.gelu(y))

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, images):
            x = nn.Conv(width, (16, 16), strides=16, padding="VALID", dtype=dtype)(images)
            x = x.reshape(len(x), -1, width)
            token = self.param("cls", nn.initializers.zeros, (1, 1, width))
            x = jnp.concatenate([jnp.tile(token.astype(x.dtype), (len(x), 1, 1)), x], 1)
            shape = (1, x.shape[1], width)
            x = x + self.param("pos", nn.initializers.normal(0.02), shape).astype(x.dtype)
            for _ in range(layers):
                x = Block()(x)
            return nn.Dense(CLASSES)(nn.LayerNorm(dtype=dtype)(x)[:, 0].astype(jnp.float32))

    model, tx = Plain(), optax.adamw(1e-3)
    images = jax.random.normal(jax.random.key(0), (batch_size, SIZE, SIZE, 3))
    labels = jax.random.randint(jax.random.key(1), (batch_size,), 0, CLASSES)
    params = jax.jit(model.init)(jax.random.key(0), images[:1])
    state = (params, tx.init(params))

    @jax.jit
    def update(state, images, labels):
        def compute_loss(params):
            logits = model.apply(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        params, opt_state = state
        loss, grads = jax.value_and_grad(compute_loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    def step():
        nonlocal state
        state, loss = update(state, images, labels)
        return loss

    return step, jax.block_until_ready


def timm_eager(variant, batch_size, compiled=False):
    import timm
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    width = {"Ti/16": "tiny", "S/16": "small", "B/16": "base", "L/16": "large"}[variant]
    model = timm.create_model(f"vit_{width}_patch16_224", num_classes=CLASSES).to(device).train()
    images = torch.randn(batch_size, 3, SIZE, SIZE, device=device)
    labels = torch.randint(CLASSES, (batch_size,), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=cuda)

    def compute_loss(images, labels):
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            return torch.nn.functional.cross_entropy(model(images), labels)

    forward = torch.compile(compute_loss) if compiled else compute_loss

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = forward(images, labels)
        loss.backward()
        optimizer.step()
        return loss

    def wait(loss):
        if cuda:
            torch.cuda.synchronize()

    return step, wait


def timm_compile(variant, batch_size):
    return timm_eager(variant, batch_size, compiled=True)


def jax_dtype():
    import jax

    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


PEERS = {f.__name__: f for f in (vit_jax, flax_plain, timm_eager, timm_compile)}


def main():
    name, variant, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if "torch" not in name:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    step, wait = PEERS[name](variant, batch_size)
    wait(step())
    first = time.perf_counter() - BEGIN
    wait(step())
    print("ready", flush=True)
    for line in sys.stdin:
        # Memory that was free while others had their turn may have gone back to the system, or to
        # the machine that this one is a guest of: the first step takes it anew, and does not count.
        wait(step())
        seconds, start, steps = float(line), time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds:
            wait(step())
            steps += 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        result = {
            "images_per_sec": steps * batch_size / elapsed,
            "first_step_s": first,
            "peak_gib": peak,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
