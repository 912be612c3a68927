#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# TPU VMs from the queue, spot or not, and training on them that survives preemption.
#
#   launch/tpu_queue.sh create NAME ZONE TYPE VERSION [--spot]    asks for one, and waits for it
#   launch/tpu_queue.sh train NAME ZONE TYPE VERSION [--spot] -- --config=... --workdir=...
#   launch/tpu_queue.sh logs NAME ZONE                            follows the output of process 0
#   launch/tpu_queue.sh status NAME ZONE
#   launch/tpu_queue.sh delete NAME ZONE                          gives it back
#
# TYPE is such as v5litepod-16, VERSION such as v2-alpha-tpuv5-lite. `train` asks for a TPU VM, trains,
# and when the machines were preempted, requests new ones and resumes; it exits when the run ends.
# DRY_RUN=1 prints the commands.
set -euo pipefail

usage() {
  sed -n '/^# TPU VMs/,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
  exit 2
}

run() {
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ "$#" -ge 3 ] || usage
action=$1 name=$2 zone=$3
shift 3

state() {
  gcloud compute tpus queued-resources describe "$name" --zone="$zone" \
    --format='value(state.state)' 2>/dev/null || echo NONE
}

create() {
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
    --accelerator-type="$type" --runtime-version="$version" ${spot:+"$spot"}
  [ -z "${DRY_RUN:-}" ] || return 0
  until [ "$(state)" = ACTIVE ]; do
    case "$(state)" in
      FAILED | SUSPENDED) echo "tpu_queue.sh: $name is $(state)" >&2; return 1 ;;
    esac
    sleep "${POLL_S:-30}"
  done
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet
}

type_and_version() {
  [ "$#" -ge 2 ] || usage
  type=$1 version=$2 spot=''
  [ "${3:-}" != --spot ] || spot=--spot
}

case $action in
  create)
    type_and_version "$@"
    create
    ;;
  train)
    type_and_version "$@"
    shift 2
    [ -z "$spot" ] || shift
    [ "${1:-}" = -- ] || usage
    shift
    for ((i = 0; i < ${MAX_RUNS:-100}; i++)); do
      if [ -n "${DRY_RUN:-}" ] || [ "$(state)" = NONE ]; then create; fi
      code=0
      run bash "$here/tpu_vm.sh" "$name" "$zone" "$@" || code=$?
      [ -z "${DRY_RUN:-}" ] || exit 0
      # Bad input is not mended by another run, nor is a run that went wrong on machines that stay.
      if [ "$code" -ne 75 ] && [ "$(state)" = ACTIVE ]; then exit "$code"; fi
      echo "tpu_queue.sh: exit code $code, $name is $(state): runs it again"
      if [ "$(state)" != ACTIVE ]; then delete; fi
    done
    ;;
  logs)
    run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=0 \
      --command='tail -n 100 -F ~/vit_jax.log'
    ;;
  status)
    run gcloud compute tpus queued-resources describe "$name" --zone="$zone"
    ;;
  delete) delete ;;
  *) usage ;;
esac
