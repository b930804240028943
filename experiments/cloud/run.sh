#!/usr/bin/env bash
# The command that every host of every path here runs; run again, it goes on where it was.
#   OUTPUT=gs://bucket/run ./run.sh [flags of jlora train]
# Exit codes: 0 done, 1 failed, 2 wrong settings, 143 saved and to be started again,
# 134 ended by JAX's runtime, as another host was lost: start again too.
set -euo pipefail
: "${OUTPUT:?set OUTPUT to a folder that every host reaches: gs://bucket/run, or a shared disk}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$OUTPUT/xla}"
cd "$(dirname "$0")"
jlora doctor --output "$OUTPUT"
exec jlora train --config train.yaml --output "$OUTPUT" --resume "$@"
