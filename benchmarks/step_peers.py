# SPDX-License-Identifier: Apache-2.0
"""The training steps that `benchmarks.step` compares; each is run in a process of its own.

    python benchmarks/step_peers.py PEER VARIANT SIZE BATCH_SIZE OVERRIDES

After the line "ready", each line that is read from stdin is a number of seconds; for each, a line
of JSON is written. All take forward and backward pass and AdamW of a ViT at SIZE x SIZE with 1,000
classes, in float32 on a CPU and in bfloat16 on an accelerator, on a batch that is in the device's
memory. OVERRIDES is JSON with what is another in the config of vit_jax. This file imports only what
its peer needs.
"""

import json
import os
import resource
import sys
import time

BEGIN = time.perf_counter()
CLASSES = 1000
# Width, layers, heads; MLPs are four times as wide.
VARIANTS = {
    "Ti/16": (192, 12, 3),
    "S/16": (384, 12, 6),
    "B/16": (768, 12, 12),
    "L/16": (1024, 24, 16),
}


def compile_vit_jax(variant, size, batch_size, overrides):
    """The experiment, its state, a batch, and the step that is compiled for them."""
    import jax

    from vit_jax.benchmark.step import make_batch
    from vit_jax.config.cpu_devices import count_cpu_devices
    from vit_jax.runtime.cpu_devices import set_cpu_devices
    from vit_jax.training.experiment import Experiment

    jax.config.update("jax_enable_compilation_cache", False)
    config = {
        "total_steps": 1000,
        "model": {"name": "vit", "variant": variant},
        "data": {
            "name": f"blank:{CLASSES},{size}",
            "split": "train",
            "preprocess": "decode",
            "batch_size": batch_size,
        },
        "optimizer": {"name": "adamw", "lr": 1e-3, "schedule": "constant"},
    }
    set_cpu_devices(count_cpu_devices(config))  # as the commands do
    config["precision"] = jax_dtype()
    for key, value in overrides.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    experiment = Experiment.from_config(config)
    state, batch = experiment.init_state(), make_batch(experiment)
    return experiment, state, batch, experiment.train_step.lower(state, batch).compile()


def vit_jax(variant, size, batch_size, overrides):
    import jax

    from vit_jax.runtime.chips import find_chip

    experiment, state, batch, compiled = compile_vit_jax(variant, size, batch_size, overrides)

    def step():
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    chip = find_chip(jax.devices()[0].device_kind)
    return step, jax.block_until_ready, describe(compiled.as_text(), chip, experiment, size)


def describe(program, chip, experiment, size):
    """What is predicted of a compiled step, by the time of its kernels; nothing for other chips."""
    if chip is None:
        return {}
    from vit_jax.models.flops import train_flops
    from vit_jax.planning.hlo import Program
    from vit_jax.planning.kernels import list_kernels, time_kernels

    kernels = time_kernels(list_kernels(Program(program)), chip)
    return {
        "mfu_percent_of_one": 100 * train_flops(experiment.model, (size, size)) / chip.flops,
        "predicted_ms": 1e3 * sum(one.seconds for one in kernels),
    }


def flax_plain(variant, size, batch_size, overrides):
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
    images = jax.random.normal(jax.random.key(0), (batch_size, size, size, 3))
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

    return step, jax.block_until_ready, {}


def timm_eager(variant, size, batch_size, overrides, compiled=False, channels_last=False):
    import timm
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    width = {"Ti/16": "tiny", "S/16": "small", "B/16": "base", "L/16": "large"}[variant]
    name = f"vit_{width}_patch16_224"
    model = timm.create_model(name, img_size=size, num_classes=CLASSES).to(device).train()
    images = torch.randn(batch_size, 3, size, size, device=device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
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

    return step, wait, {}


def timm_compile(*args):
    return timm_eager(*args, compiled=True)


def timm_channels_last(*args):
    return timm_eager(*args, compiled=True, channels_last=True)


def jax_dtype():
    import jax

    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def compare_with_prediction(speed, batch_size, known):
    """MFU, milliseconds of a step, and what the prediction of `describe` is off by, in percent."""
    if not known:
        return {}
    measured = 1e3 * batch_size / speed
    return {
        "mfu_percent": speed * known["mfu_percent_of_one"],
        "step_ms": measured,
        "predicted_ms": known["predicted_ms"],
        "error_percent": 100 * (known["predicted_ms"] / measured - 1),
    }


def peak_gib(name):
    """Of the GPU's memory; of the process, where there is none."""
    if name.startswith("timm"):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**30
    else:
        import jax

        stats = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            return stats["peak_bytes_in_use"] / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


PEERS = {f.__name__: f for f in (vit_jax, flax_plain, timm_eager, timm_compile, timm_channels_last)}


def main():
    name, variant, size, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    # The peers have the memory of a GPU together.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    step, wait, known = PEERS[name](variant, size, batch_size, json.loads(sys.argv[5]))
    wait(step())
    first = time.perf_counter() - BEGIN
    wait(step())
    print("ready", flush=True)
    for line in sys.stdin:
        # Memory that was free while others had their turn may have gone back to the system, or to
        # the machine that this one is a guest of: the first step maps it again, and does not count.
        wait(step())
        seconds, start, steps = float(line), time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds:
            wait(step())
            steps += 1
        speed = steps * batch_size / elapsed
        result = {
            "images_per_sec": speed,
            "first_step_s": first,
            "peak_gib": peak_gib(name),
        }
        result |= compare_with_prediction(speed, batch_size, known)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
