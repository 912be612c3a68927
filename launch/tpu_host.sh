#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Trains on this host of a TPU VM; `tpu_vm.sh` runs it on all of them.
#
#   launch/tpu_host.sh --config=... --workdir=...
#
# When the machine announces its preemption, which is before any signal comes, the run is asked
# to save. The output is in ~/vit_jax.log too, for those who come later, and the exit code is that of
# training. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

says() {
  curl -sf -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/$1"
}

watch_machine() {
  until [ "$(says maintenance-event)" = TERMINATE_ON_HOST_MAINTENANCE ] ||
    [ "$(says preempted)" = TRUE ]; do
    sleep "${POLL_S:-5}"
  done
  echo "tpu_host.sh: this machine will be taken away"
  kill -TERM "$1"
}

# Not through a pipe, whose exit code and process would be those of tee.
"${PYTHON:-$HOME/vit_jax_env/bin/python}" -m vit_jax.main --coordinator=auto "$@" \
  > >(tee -a "$HOME/vit_jax.log") 2>&1 &
train=$!
watch_machine "$train" &
watcher=$!
code=0
wait "$train" || code=$?
kill "$watcher" 2>/dev/null || true
exit "$code"
