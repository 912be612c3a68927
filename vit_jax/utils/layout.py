# SPDX-License-Identifier: Apache-2.0
"""Names of the files and folders in a workdir."""

CONFIG = "config.json"  # the resolved config
RUN = "run.json"  # versions, machine, data and command of the newest start
LABELS = "labels.txt"  # one class name a line
LOCK = "lock"  # held by the process that trains
CHECKPOINTS = "checkpoints"  # a folder for each step
MANIFEST = "manifest.json"  # in a checkpoint: its files, with their checksums
BROKEN = "broken"  # damaged checkpoints, moved out of the way by a restore
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
LEDGER = "ledger.jsonl"  # seconds by kind of work
TRACKERS_FILE = "trackers.json"  # identifiers of the runs in trackers
EVALS = "evals"  # details of evaluations, such as results by class
RESULTS = "evals.jsonl"  # results of the command `evaluate`
TEMPERATURE = "temperature.json"  # fitted divisor of the logits of one checkpoint
CHECK = "check"  # what `data.check` found in the data with the model of the run
DUPLICATES = "duplicates.csv"  # in CHECK: pairs of similar images
LABEL_ERRORS = "label_errors.csv"  # in CHECK: labels that are likely wrong
DIVERGENCE = "divergence"  # batches and norms of steps that diverged
ROLLBACKS = "rollbacks.jsonl"  # in DIVERGENCE: steps that are left out
PROFILE = "profile"
REPORT = "report.html"
