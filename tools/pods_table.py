# SPDX-License-Identifier: Apache-2.0
"""Compiles the ImageNet-1k recipe for TPU pods and hosts of GPUs, and writes docs/pods.md.

Each size is compiled with its layers written out and as a scan, each on the mesh that arithmetic
finds the fastest of those that fit; if it does not fit, on the next. On GPUs a scan moves twice the
bytes, so there it is compiled only if the layers written out do not fit. `--ways=scan` compiles
nothing but a scan, which takes less time. A cell takes minutes on two cores. The results are
written after each cell, and cells that are there are not compiled again.

python -m tools.pods_table --sizes S/16,B/16 --topologies v5e:4x4,4xh200:8
"""

import argparse
import concurrent.futures
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from vit_jax.config.load import load_config
from vit_jax.config.reduced import reduce_for_planning
from vit_jax.planning.search import (
    Candidate,
    could_fit,
    default_cache,
    format_overrides,
    make_candidates,
    plan_in_subprocess,
)
from vit_jax.planning.topologies import Topology, parse_topology

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "pods.md"
RESULTS = ROOT / "benchmarks" / "results" / "pods.json"
START, END = "<!-- made by tools/pods_table.py -->\n", "<!-- end -->\n"
SIZES = ("S/16", "B/16", "L/16", "H/14", "g/14", "G/14")
# `4xh200:8` are four hosts.
TOPOLOGIES = (
    *("v5e:4x4", "v5e:16x16", "v6e:4x4", "v5p:4x4x4", "tpu7x:2x2x4"),
    *("h100:8", "h200:8", "4xh200:8", "b200:8"),
)
# What an estimate may be below the compiler's: a first try should fit.
_SAFE = 1.12
_TRIES = 3
# `model.remat` and `model.scan` of those that are compiled: which is faster, arithmetic can't tell.
WAYS = {"unrolled": ("none", False), "scan": ("dots", True)}
_GIB = 2**30
# Of a plan, what the results do not keep.
_LEFT_OUT = ("notes", "cached", "kernels")


def config_of(size: str) -> tuple[str, dict[str, Any]]:
    """The config that trains a size, and what it needs besides: the recipe names sizes up to L."""
    if size in ("S/16", "B/16", "L/16"):
        return f"configs/vit_i1k.py:variant={size}", {}
    changes = {"model.variant": size, "model.representation_size": None}
    return "configs/vit_i1k.py:variant=L/16", changes


def make_topology(name: str) -> Topology:
    """The topology of a name such as `v5e:4x4`, or `4xh200:8` for four slices or hosts."""
    count, rest = re.fullmatch(r"(?:(\d+)x)?(.*)", name).groups()  # pyright: ignore
    return parse_topology(rest, num_slices=int(count or 1))


def find_candidates(size: str, name: str) -> list[Candidate]:
    """The ways to run a size on a topology that fit by arithmetic, the fastest first."""
    config, changes = config_of(size)
    topology = make_topology(name)
    prepared = reduce_for_planning(load_config(config, changes).to_dict())
    limit = topology.chip.hbm_bytes if topology.chip else 0
    candidates = make_candidates(prepared, topology)
    return [c for c in candidates if could_fit(c, limit, ratio=_SAFE)]


def estimate_cell(size: str, name: str) -> dict[str, Any]:
    """What arithmetic says of a size on a topology."""
    candidates = find_candidates(size, name)
    if not candidates:
        return {"compiled": False, "fits": False}
    first, changes, chip = candidates[0], config_of(size)[1], make_topology(name).chip
    return {
        "compiled": False,
        "fits": True,
        "accum_steps": first.overrides["optimizer.accum_steps"],
        "images_per_device": first.images * first.overrides["optimizer.accum_steps"],
        "peak_bytes": first.argument_bytes + first.temp_bytes,
        "hbm_limit_bytes": chip.hbm_bytes if chip else None,
        "overrides": format_overrides(changes | first.overrides),
    }


def fill_cell(size: str, name: str, cache: Path, ways: Sequence[str]) -> dict[str, Any]:
    """The plan of a size on a topology, and how it is to be run."""
    candidates = find_candidates(size, name)
    plans: list[dict[str, Any]] = []
    for way in (WAYS[way] for way in ways):
        chosen = [c for c in candidates if _way(c) == way]
        if chosen:
            plans.append(_compile_first(chosen, size, name, cache))
        if plans and plans[-1]["fits"] and not make_topology(name).is_tpu:
            break
    if not plans:  # The ways that are left recompute more.
        plans = [_compile_first(candidates, size, name, cache)]
    return max(plans, key=lambda p: (p["fits"], p.get("images_per_second_per_chip") or 0))


def _way(candidate: Candidate) -> tuple[str, bool]:
    return candidate.overrides["model.remat"], candidate.overrides["model.scan"]


def _compile_first(
    candidates: Sequence[Candidate], size: str, name: str, cache: Path
) -> dict[str, Any]:
    """The plan of the first that fits, of a few that are tried."""
    config, changes = config_of(size)
    chip = make_topology(name).chip
    topology = make_topology(name)
    arguments = [
        f"--config={config}",
        f"--topology={topology.name}",
        f"--num_slices={topology.num_slices}",
        f"--cache={cache}",
    ]
    tried: list[dict[str, Any]] = []
    ratio = _SAFE
    for candidate in candidates:
        if len(tried) == _TRIES:
            break
        if chip is not None and not could_fit(candidate, chip.hbm_bytes, ratio=ratio):
            continue
        plan = plan_in_subprocess(arguments, changes | candidate.overrides)
        tried.append(plan | {"overrides": format_overrides(changes | candidate.overrides)})
        if plan["fits"]:
            break
        if plan.get("temp_bytes"):
            ratio = max(ratio, 1.02 * plan["temp_bytes"] / candidate.temp_bytes)
    if not tried:
        return {"compiled": True, "fits": False, "error": "nothing fits by arithmetic", "tries": 0}
    return tried[-1] | {"compiled": True, "tries": len(tried)}


def make_table(cells: dict[str, dict[str, Any]]) -> str:
    """The page's table, a row for each size and topology."""
    rows = [
        "| size | topology | fits | images a device | GiB | expected | at best | overrides |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for size in SIZES:
        for name in TOPOLOGIES:
            cell = cells.get(f"{size}@{name}")
            row = ("not looked at yet", "", "", "", "", "") if cell is None else _row(cell)
            rows.append(f"| {size} | {name} | {' | '.join(row)} |")
    return "\n".join(rows) + "\n"


def _row(cell: dict[str, Any]) -> tuple[str, ...]:
    by = "" if cell["compiled"] else " *"
    if not cell["fits"]:
        return (f"no{by}: {_why(cell)}", "", "", "", "", "")
    accum = cell["accum_steps"]
    ways = [w for w in cell["overrides"].split() if not w.endswith(("=-1", "tensor=1", "steps=1"))]
    expected = best = ""
    if cell["compiled"]:
        best = f"MFU {cell['mfu_bound']:.0%}, {cell['bound_by']}"
        if cell["expected_mfu"]:
            speed = cell["images_per_second_per_chip"]
            expected = f"{speed:,.0f} images/s, MFU {cell['expected_mfu']:.0%}"
    return (
        f"yes{by}",
        f"{cell['images_per_device']:g}" + (f" in {accum} parts" if accum > 1 else ""),
        f"{cell['peak_bytes'] / _GIB:.1f} of {cell['hbm_limit_bytes'] / _GIB:.1f}",
        expected,
        best,
        f"`{' '.join(w.removeprefix('--config.') for w in ways)}`",
    )


def _why(cell: dict[str, Any]) -> str:
    if cell.get("hbm_limit_bytes") and cell.get("peak_bytes"):
        return f"{cell['peak_bytes'] / _GIB:.1f} of {cell['hbm_limit_bytes'] / _GIB:.1f} GiB"
    return str(cell.get("error") or "nothing fits").replace("|", "/")[:120]


def renew(text: str, cells: dict[str, dict[str, Any]]) -> str:
    """Returns the page with the text between the two marks replaced."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{make_table(cells)}{END}{after}"


def load_results() -> dict[str, dict[str, Any]]:
    """Cells by `SIZE@TOPOLOGY`."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def main(argv: Sequence[str] | None = None) -> None:
    """Fills the cells that are asked for and not there yet; writes after each of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=lambda x: x.split(","), default=SIZES)
    parser.add_argument("--topologies", type=lambda x: x.split(","), default=TOPOLOGIES)
    parser.add_argument("--ways", type=lambda x: x.split(","), default=tuple(WAYS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--estimate", action="store_true", help="by arithmetic only, in a minute")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    cells = load_results()
    asked = [(s, t) for s in args.sizes for t in args.topologies]
    if args.estimate:
        todo = [(s, t) for s, t in asked if f"{s}@{t}" not in cells]
    else:
        todo = [(s, t) for s, t in asked if not cells.get(f"{s}@{t}", {}).get("compiled")]

    def fill(cell: tuple[str, str]) -> dict[str, Any]:
        return estimate_cell(*cell) if args.estimate else fill_cell(*cell, args.cache, args.ways)

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(fill, cell): "@".join(cell) for cell in todo}
        for future in concurrent.futures.as_completed(futures):
            cell = future.result()
            cells[futures[future]] = {k: v for k, v in cell.items() if k not in _LEFT_OUT}
            print(futures[future], "fits" if cell["fits"] else f"does not fit: {_why(cell)}")
            keys = [f"{s}@{t}" for s in SIZES for t in TOPOLOGIES]
            ordered = {key: cells[key] for key in keys if key in cells}
            RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(renew(PAGE.read_text(encoding="utf-8"), cells), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
