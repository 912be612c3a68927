# SPDX-License-Identifier: Apache-2.0
"""Plans as lines of text."""

from collections.abc import Iterator, Sequence

from vit_jax.planning.plan import Plan
from vit_jax.planning.scale import Row
from vit_jax.planning.search import Candidate, could_fit, format_overrides
from vit_jax.planning.topologies import Topology
from vit_jax.runtime.chips import GPUS

_GIB = 2**30


def describe_plan(plan: Plan) -> Iterator[str]:
    """Describes a plan."""
    mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    unit = "hosts" if plan["topology"].partition(":")[0] in GPUS else "slices"
    slices = f" x {plan['num_slices']} {unit}" if plan["num_slices"] > 1 else ""
    yield f"{plan['topology']}{slices}: {plan['num_devices']} devices, {mesh}"
    accum = f" in {plan['accum_steps']} micro-batches" if plan["accum_steps"] > 1 else ""
    yield f"  batch         {plan['batch_size']:,}: {plan['images_per_device']:g} a device{accum}"
    yield f"  memory        {_memory(plan)}"
    predicted = plan["predicted"]
    parts = ("params", "opt_state", "ema_params", "constants", "batch", "gradients", "activations")
    shown = ", ".join(f"{p.replace('_', ' ')} {_gib(predicted[p])}" for p in parts if predicted[p])
    yield f"  by arithmetic {shown}"
    again = plan["flops_per_device"] / plan["model_flops_per_device"]
    yield f"  operations    {plan['flops_per_device']:.3g} a device, {again:.2f} x the model's"
    if plan["hbm_bytes"] is not None:
        yield f"  moves         {plan['hbm_bytes'] / 1e9:,.1f} GB in memory"
    for c in plan["collectives"]:
        between = "hosts" if plan["topology"].partition(":")[0] in GPUS else "slices"
        dcn = f", {c['dcn_bytes'] / 1e6:,.1f} MB between {between}" if c["dcn_bytes"] else ""
        took = "" if c["seconds"] is None else f", {1e3 * c['seconds']:.2f} ms"
        times = f"{c['count']:,} time{'s' * (c['count'] > 1)}"
        where, sent = " and ".join(c["axes"]), f"{c['bytes'] / 1e6:,.1f} MB"
        yield f"    {c['kind']:<19} {where:<16} {times:>11}, together {sent:>10}{dcn}{took}"
    if plan["roofline"] is not None:
        seconds = plan["roofline"]
        units = ("compute", "hbm", "ici", "dcn")
        busy = ", ".join(f"{u} {1e3 * seconds[f'{u}_seconds']:.1f} ms" for u in units)
        yield f"  at best       {1e3 * plan['step_seconds']:.1f} ms a step ({busy})"
        best, expected = plan["mfu_bound"], plan["expected_seconds"]
        yield f"                MFU {best:.0%}"
        if expected is not None:
            yield f"  expected      {1e3 * expected:.1f} ms a step: MFU {plan['expected_mfu']:.0%}"
            busy = f"{plan['num_kernels']:,} kernels take {1e3 * plan['kernel_seconds']:.1f} ms"
            if plan["wait_seconds"] is None:
                yield f"                {busy}; waits for transfers are not included"
            else:
                sent, waited = 1e3 * plan["transfer_seconds"], 1e3 * plan["wait_seconds"]
                yield f"                {busy}; transfers take {sent:.1f} ms,"
                yield f"                {waited:.1f} of which no kernel runs meanwhile"
        yield f"                {plan['images_per_second_per_chip']:,.0f} images/s a chip"
    cached = " (kept from before)" if plan["cached"] else ""
    yield f"  compiled in   {plan['compile_seconds']:.0f} s{cached}"
    for note in plan["notes"]:
        yield f"  note: {note}"


def describe_kernels(plan: Plan, limit: int = 20) -> Iterator[str]:
    """A table of the kernels that take the longest; those of all blocks are in one row."""
    kernels = plan["kernels"]
    if not kernels:
        yield "  no kernels: the step was not compiled for this chip"
        return
    total = sum(kernel["seconds"] for kernel in kernels)
    shown = kernels[:limit]
    yield f"  {plan['num_kernels']:,} kernels, {1e3 * total:.2f} ms; the longest:"
    yield f"  {'ms':>8} {'share':>6} {'runs':>5} {'MB each':>9} {'GFLOP':>7}  bound    layer"
    for kernel in shown:
        backward = ", backward" if kernel["backward"] else ""
        yield (
            f"  {1e3 * kernel['seconds']:8.3f} {kernel['seconds'] / total:6.1%} "
            f"{kernel['count']:5d} {kernel['bytes'] / 1e6:9,.1f} {kernel['flops'] / 1e9:7,.1f}  "
            f"{kernel['bound']:<7}  {kernel['layer']} ({kernel['kind']}{backward})"
        )


def describe_remedies(plan: Plan, candidates: Sequence[Candidate]) -> Iterator[str]:
    """Lists what should fit in place of a plan that does not, by arithmetic."""
    limit = plan["hbm_limit_bytes"]
    fitting = [c for c in candidates if could_fit(c, limit, ratio=1.1)]
    if not fitting:
        yield "  nothing that --search tries would fit; take more devices or a smaller batch"
        return
    yield "  what should fit, by arithmetic, the fastest first (--search compiles them):"
    for c in fitting[:3]:
        yield f"    {_gib(c.argument_bytes + c.temp_bytes):>10}  {format_overrides(c.overrides)}"


def describe_search(results: Sequence[tuple[Candidate, Plan]], tried: int) -> Iterator[str]:
    """Lists the compiled candidates, the best first, and the overrides of the best."""
    yield f"{tried} ways to run this, {len(results)} of them compiled:"
    yield f"  {'images/s a chip':>15}  {'MFU':>4}  {'memory':>10}  bound    overrides"
    for candidate, plan in results:
        shown = format_overrides(candidate.overrides)
        if plan.get("step_seconds") is None or not plan["fits"]:
            why = _memory(plan) if plan.get("hbm_limit_bytes") else plan.get("error")
            yield f"  {'does not fit':>15}  {shown}: {why}"
            continue
        speed = f"{plan['images_per_second_per_chip']:,.0f}"
        memory = _gib(plan["peak_bytes"])
        mfu, bound = plan["expected_mfu"] or plan["mfu_bound"], plan["bound_by"]
        yield f"  {speed:>15}  {mfu:>4.0%}  {memory:>10}  {bound:<7}  {shown}"
    best = next((candidate for candidate, plan in results if plan.get("fits")), None)
    if best is None:
        yield "nothing fits: take more devices or a smaller data.batch_size"
        return
    yield "add to the command:"
    yield f"  {format_overrides(best.overrides)}"


def describe_scale(
    rows: Sequence[Row], points: Sequence[Plan], topology: Topology
) -> Iterator[str]:
    """The table of `--scale`: a line for each number of chips."""
    compiled = topology.num_chips
    how = "expected" if points[0]["expected_seconds"] else "at best"
    yield f"batch {points[0]['batch_size']:,}, {how}; compiled for {compiled} chips"
    places = ("slices", "ICI", "DCN") if topology.is_tpu else ("hosts", "NVLink", "network")
    head = ("chips", places[0], "a device", "images/s", "MFU", *places[1:], "bound", "efficiency")
    yield "  " + "".join(f"{name:>12}" for name in head)
    for row in rows:
        cells = (
            f"{row.chips:,}" + ("" if row.chips == compiled else " *"),
            str(row.slices),
            f"{row.images_per_device:g}",
            f"{row.images_per_second:,.0f}",
            f"{row.mfu:.0%}",
            f"{row.ici_bytes / 1e6:,.0f} MB",
            f"{row.dcn_bytes / 1e6:,.1f} MB",
            row.bound_by,
            f"{row.efficiency:.0%}",
        )
        yield "  " + "".join(f"{cell:>12}" for cell in cells)
    yield "  * by the model that the compiled steps calibrate, not compiled; latency is not in it"
    stop = next((row for row in rows if not row.scales), None)
    if stop is None:
        yield "the recipe scales to all of them"
    elif stop.images_per_device * points[0]["mesh"]["tensor"] < 1:
        yield f"the recipe stops at {stop.chips:,} chips: there is less than an image for each"
    else:
        yield f"the recipe stops scaling before {stop.chips:,} chips, bound by {stop.bound_by}"


def _memory(plan: Plan) -> str:
    limit, peak = plan["hbm_limit_bytes"], plan["peak_bytes"]
    parts = f"arguments {_gib(plan['argument_bytes'])}, temporaries {_gib(plan['temp_bytes'])}"
    if limit is None:
        return f"{_gib(peak)} ({parts})"
    if plan["fits"]:
        return f"fits: {_gib(peak)} of {_gib(limit)} ({parts})"
    over = f", {_gib(peak - limit)} too much" if peak > limit else ""
    return f"does not fit: {_gib(peak)} of {_gib(limit)}{over} ({parts})"


def _gib(size: float) -> str:
    if size < 10 * 2**20:
        return f"{size / 2**10:,.1f} KiB"
    return f"{size / _GIB:,.2f} GiB" if size >= _GIB / 10 else f"{size / 2**20:,.1f} MiB"
