#!/usr/bin/env bash
# The same on a GKE cluster that xpk made (pip install xpk): xpk writes the JobSet.
#   CLUSTER=c PROJECT=p ZONE=z IMAGE=REGION-docker.pkg.dev/.../jlora OUTPUT=gs://bucket/run ./xpk.sh
set -euo pipefail
: "${CLUSTER:?}" "${PROJECT:?}" "${ZONE:?}" "${IMAGE:?}" "${OUTPUT:?}"
xpk workload create --cluster "$CLUSTER" --project "$PROJECT" --zone "$ZONE" \
  --workload "${NAME:-jlora}" --tpu-type "${TYPE:-v5litepod-8}" --num-slices 1 \
  --docker-image "$IMAGE" --max-restarts 20 \
  --command "OUTPUT=$OUTPUT ./experiments/cloud/run.sh"
