# SPDX-License-Identifier: Apache-2.0
"""The names of the files and folders in a workdir."""

CONFIG = "config.json"  # the resolved config
RUN = "run.json"  # versions, machine, data and command of the newest start
LABELS = "labels.txt"  # a class name a line
LOCK = "lock"  # held by the process that trains
CHECKPOINTS = "checkpoints"  # a folder for each step
BROKEN = "broken"  # damaged checkpoints, moved out of the way by a restore
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
LEDGER = "ledger.jsonl"  # what the time went into
TRACKERS_FILE = "trackers.json"  # the runs of trackers, to be continued on resume
EVALS = "evals"  # details of evaluations, such as results by class
RESULTS = "evals.jsonl"  # of the command `evaluate`
DIVERGENCE = "divergence"  # batches and norms of steps that diverged
ROLLBACKS = "rollbacks.jsonl"  # in DIVERGENCE: the steps that are left out
PROFILE = "profile"
REPORT = "report.html"
