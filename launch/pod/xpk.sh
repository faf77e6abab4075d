#!/usr/bin/env bash
# Runs one command on all hosts of a GKE cluster made with xpk.
#
#   launch/pod/xpk.sh CLUSTER NAME v5litepod-256 launch/train.py \
#       --config configs/jodiffusion.py --workdir gs://BUCKET/runs/jodiffusion
#
# xpk packs this checkout into a container (IMAGE, which must hold the dependencies), starts one pod
# per host and restarts all of them up to TRIES times: after a stop on SIGTERM (75) or a lost host
# (76, 134) the run goes on from the newest checkpoint. A mistake in config or data (2) is started
# again as well, and says the same each time. jax finds the others through GKE's variables.
#
# Environment: IMAGE (needed: base docker image), SLICES (default 1), TRIES (default 10), PROJECT
# and ZONE (default: gcloud's own).

set -euo pipefail

if [ $# -lt 4 ] || [ -z "${IMAGE:-}" ]; then
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit 2
fi
cluster=$1 name=$2 kind=$3
shift 3

place=()
[ -z "${PROJECT:-}" ] || place+=(--project="$PROJECT")
[ -z "${ZONE:-}" ] || place+=(--zone="$ZONE")

xpk workload create "${place[@]}" --cluster="$cluster" --workload="$name" --tpu-type="$kind" \
  --num-slices="${SLICES:-1}" --max-restarts="${TRIES:-10}" \
  --base-docker-image="$IMAGE" --script-dir="$(dirname "$0")/../.." \
  --command="python3 $(printf '%q ' "$@")"
