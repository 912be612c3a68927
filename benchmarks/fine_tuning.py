# SPDX-License-Identifier: Apache-2.0
"""Ways to fine-tune a checkpoint: accuracy, robustness, and what each trains, stores and costs.

    python -m benchmarks.fine_tuning --task=digits --workdir=runs/fine_tuning_digits \
        --json benchmarks/results/fine_tuning_digits.json
    python -m benchmarks.fine_tuning --task=cifar10 --images=/data/cifar10 \
        --workdir=runs/fine_tuning_cifar10 --json benchmarks/results/fine_tuning_cifar10.json

`digits` pre-trains `configs/digits.py` on digits of 16 x 16 pixels, and fine-tunes it at 32 x 32.
`cifar10` pre-trains the model of `configs/cifar10_mae.py` on five classes of CIFAR-10 with labels,
and fine-tunes it with 500 images of each of the other five. First a linear probe is trained with
each seed. All parameters, and LoRA, then start from the probe of the first seed, so all runs have
one start and one kind of head: they can be averaged, and interpolated with the start (WiSE-FT).
Greedy soups and the point of the interpolation are chosen on `val`. Corruptions are those of
ImageNet-C at three severities, made of test images. Learning rates were not tuned.

The same command resumes where it was stopped. --steps shortens all runs. It ends with the table of
the documentation.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
METHODS = ("probe", "lora", "full")
LABELS = {
    "probe": "linear probe",
    "lora": "LoRA",
    "full": "all parameters",
    "wise": "WiSE-FT: between the start and all parameters",
    "uniform": "mean of the runs of all parameters",
    "greedy": "greedy soup of them",
}
# Of the classes of CIFAR-10, those that are pre-trained on; the others are fine-tuned on.
PRETRAINED_CLASSES = ("airplane", "bird", "deer", "frog", "ship")
SEVERITIES = (1, 3, 5)
_LORA = ("--config.lora.rank=4", "--config.lora.alpha=8")
_ONLY_HEAD = "--config.optimizer.freeze=('(?!head/).*',)"


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, as configs and changes of them.

    Attributes:
      pretrain: config, with its argument.
      fine_tune: config, whose argument is the weights to start from.
      changes: arguments by run: `pretrain`, `fine_tune` of all methods, and each of `METHODS`.
      corrupted: split of the images that are corrupted.
    """

    pretrain: str
    fine_tune: str
    changes: Mapping[str, tuple[str, ...]]
    corrupted: str


TASKS = {
    "digits": Task(
        pretrain="configs/digits.py",
        fine_tune="configs/digits_finetune.py",
        changes={
            "pretrain": (),
            "fine_tune": ("--config.total_steps=300",),
            "probe": ("--config.optimizer.lr=0.3", _ONLY_HEAD),
            "lora": ("--config.optimizer.lr=0.1", *_LORA),
            "full": (),
        },
        corrupted="test",
    ),
    "cifar10": Task(
        pretrain="configs/cifar10_mae.py:none",
        fine_tune="configs/cifar10_mae.py",
        changes={
            "pretrain": ("--config.data.split=train[:98%]", "--config.epochs=10"),
            "fine_tune": ("--config.epochs=20",),
            "probe": ("--config.optimizer.lr=0.01", _ONLY_HEAD),
            "lora": ("--config.optimizer.lr=0.003", *_LORA),
            "full": ("--config.optimizer.lr=0.0003",),
        },
        corrupted="test[:10%]",
    ),
}


def write_manifests(images: Path, folder: Path) -> dict[str, Path]:
    """Lists the images of the classes of pre-training and of the others, classes in turn."""
    written = {}
    for name in ("pretrain", "fine_tune"):
        rows = []
        for path in images.glob("*/*/*"):
            split, label = path.parts[-3:-1]
            if (label in PRETRAINED_CLASSES) == (name == "pretrain"):
                rows.append((split, path.name, label, str(path.absolute())))
        if not rows:
            raise SystemExit(f"--images={images} has no train/CLASS/IMAGE and test/CLASS/IMAGE")
        lines = ["image,label,split"]
        lines += [f"{path},{label},{split}" for split, _, label, path in sorted(rows)]
        written[name] = folder / f"{name}.csv"
        written[name].write_text("\n".join(lines) + "\n")
    return written


def train(workdir: Path, config: str, arguments: list[str]) -> dict[str, Any]:
    """Runs the command, unless it has ended; returns what it trained, stored and cost.

    The cost is the time of all its processor cores, which other programs on the machine disturb
    less than they do the time that passes.
    """
    record = workdir.with_suffix(".json")
    if record.exists():
        return json.loads(record.read_text())
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "vit_jax.main", f"--config={config}", f"--workdir={workdir}"]
    subprocess.run([*command, *arguments], check=True)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = _describe(workdir)
    found["core_seconds"] = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
    record.write_text(json.dumps(found) + "\n")
    return found


def _describe(workdir: Path) -> dict[str, Any]:
    from vit_jax.checkpoint.listing import find_checkpoint
    from vit_jax.checkpoint.workdir import read_config
    from vit_jax.training.experiment import Experiment
    from vit_jax.utils import tree

    experiment = Experiment.from_config(read_config(workdir))
    trained, _ = experiment.optimizer.rules.split(experiment.abstract_state.params)
    files = [path for path in find_checkpoint(workdir).rglob("*") if path.is_file()]
    return {
        "trained": tree.count(trained),
        "checkpoint_bytes": sum(path.stat().st_size for path in files),
    }


class Judged:
    """Results of weights by name, which are kept in a file."""

    def __init__(self, workdir: Path, config: dict[str, Any], corrupted: str):
        from vit_jax.training.evaluation import Judge, make_evaluation

        data = {key: config["evals"]["test"][key] for key in ("preprocess",)}
        severe = {"name": "corruptions", "split": corrupted, "severities": SEVERITIES}
        evals = {
            "val": {"split": config["evals"]["val"]["split"], **data},
            "test": {"split": "test", **data},
            "corrupted": {**severe, **data},
        }
        self._judge = Judge(make_evaluation({**config, "evals": evals}, {}))
        self._file = workdir / "judged.json"
        self._known = json.loads(self._file.read_text()) if self._file.exists() else {}

    def __call__(self, name: str, weights: Callable[[], Any]) -> dict[str, float]:
        """Accuracies of the weights that a function returns, which is called if they are new."""
        from vit_jax.evaluators.base import evaluate

        if name not in self._known:
            params, found = self._judge.place(weights(), name), {}
            for evaluator in self._judge.evaluators:
                found |= evaluate(evaluator, params, None)
            self._known[name] = {k: v for k, v in found.items() if k.endswith("top1")}
            self._file.write_text(json.dumps(self._known, indent=1) + "\n")
        print(f"{name:<20} test {self._known[name]['test/top1']:.2%}", flush=True)
        return self._known[name]


def run(task: Task, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains and judges everything; returns a row for each of the judged weights."""
    from vit_jax.checkpoint.pretrained.averaging import average, average_greedily
    from vit_jax.checkpoint.pretrained.load import load_pretrained
    from vit_jax.checkpoint.workdir import read_config

    workdir = args.workdir.absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    manifests = write_manifests(args.images, workdir) if args.task == "cifar10" else {}

    def arguments(stage: str, seed: int) -> list[str]:
        of_stage = "pretrain" if stage == "pretrain" else "fine_tune"
        changes = [*task.changes[of_stage], f"--config.seed={seed}"]
        if stage != "pretrain":
            changes += task.changes[stage]
        if manifests:
            changes.append(f"--config.data.name=manifest:{manifests[of_stage]}")
        if args.steps:
            changes += [f"--config.total_steps={args.steps}", "--config.epochs=none"]
            changes += [
                "--config.optimizer.warmup_steps=0",
                "--config.optimizer.warmup_percent=none",
            ]
        return changes

    pretrained, first = workdir / "pretrained", args.seeds[0]
    train(pretrained, task.pretrain, arguments("pretrain", 0))
    costs = {}
    for method in METHODS:
        start = pretrained if method == "probe" else workdir / f"probe_{first}"
        for seed in args.seeds:
            folder = workdir / f"{method}_{seed}"
            costs[method, seed] = train(
                folder, f"{task.fine_tune}:{start}", arguments(method, seed)
            )

    config = read_config(workdir / f"full_{first}")
    judged = Judged(workdir, config, task.corrupted)

    def load(name: str) -> Any:
        return load_pretrained(str(workdir / name))

    rows = []

    def add(method: str, name: str, weights: Callable[[], Any], **more: Any) -> None:
        rows.append({"method": method, **more, **judged(name, weights)})

    start = f"probe_{first}"
    for method in METHODS:
        for seed in args.seeds:
            name = f"{method}_{seed}"
            add(method, name, lambda n=name: load(n), seed=seed, **costs[method, seed])
    for seed in args.seeds:
        for alpha in ALPHAS:
            ends = {0.0: start, 1.0: f"full_{seed}"}
            name = ends.get(alpha, f"wise_{seed}_{alpha:g}")

            def between(seed: int = seed, alpha: float = alpha) -> Any:
                both = [load(start), load(f"full_{seed}")]
                return average(both, [1 - alpha, alpha], note="between two weights")

            add("wise", name, between, seed=seed, alpha=alpha)
    names = [f"full_{seed}" for seed in args.seeds]

    def mean() -> Any:
        weights = [load(name) for name in names]
        return average(weights, [1 / len(weights)] * len(weights), note="the mean of all")

    def greedy() -> Any:
        weights = [load(name) for name in names]
        score = lambda w, name: judged(name.replace("with ", "greedy_with_"), lambda: w)["val/top1"]  # noqa: E731
        return average_greedily(weights, names, score, metric="val/top1")

    add("uniform", "uniform", mean)
    add("greedy", "greedy", greedy)
    return rows


def choose_wise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each seed's interpolation the row that is best on `val`; of equal ones, the last."""
    wise = [row for row in rows if row["method"] == "wise"]
    return [
        max((r for r in wise if r["seed"] == seed), key=lambda r: (r["val/top1"], r["alpha"]))
        for seed in sorted({r["seed"] for r in wise})
    ]


def make_tables(record: Mapping[str, Any]) -> str:
    """Markdown: a table of methods, and the curve of the interpolation, of a file of results."""
    rows = record["rows"]
    by_method = {name: [r for r in rows if r["method"] == name] for name in LABELS}
    by_method["wise"] = choose_wise(rows)
    lines = [
        "| method | trained | checkpoint | core-seconds | test | corrupted |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, label in LABELS.items():
        found = by_method[name]
        if not found:
            continue
        costs = "| | | |"
        if "trained" in found[0]:
            size = statistics.mean(r["checkpoint_bytes"] for r in found) / 1e6
            seconds = statistics.mean(r["core_seconds"] for r in found)
            costs = f"| {found[0]['trained']:,} | {size:.2f} MB | {seconds:.0f} |"
        scores = (_span([r[f"{split}/top1"] for r in found]) for split in ("test", "corrupted"))
        lines.append(f"| {label} {costs} {' | '.join(scores)} |")
    alphas = sorted({r["alpha"] for r in rows if "alpha" in r})
    lines += [
        "",
        f"| share of the fine-tuned weights | {' | '.join(f'{a:g}' for a in alphas)} |",
        "| --- |" + " --- |" * len(alphas),
    ]
    for split in ("test", "corrupted"):
        means = (
            statistics.mean(r[f"{split}/top1"] for r in rows if r.get("alpha") == a) for a in alphas
        )
        lines.append(f"| {split} | {' | '.join(f'{mean:.1%}' for mean in means)} |")
    return "\n".join(lines).replace("%", " %") + "\n"


def _span(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1%}"
    return f"{statistics.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument(
        "--images", type=Path, help="folder of CIFAR-10: train/CLASS/IMAGE and test"
    )
    parser.add_argument("--workdir", type=Path, required=True, help="a folder for each run is here")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="length of all runs in place of their own")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args()
    if args.task == "cifar10" and args.images is None:
        parser.error("--task=cifar10 needs --images")

    from benchmarks.environment import describe_device, describe_environment, write_results

    rows = run(TASKS[args.task], args)
    record = describe_environment("jax", "flax", "optax") | {
        "device": describe_device(),
        "task": args.task,
        "steps": args.steps,
        "severities": SEVERITIES,
        "rows": rows,
    }
    print(make_tables(record))
    if args.json:
        write_results(args.json, record, indent=1)


if __name__ == "__main__":
    main()
