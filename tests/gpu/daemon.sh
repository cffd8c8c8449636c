#!/bin/bash
# The whole daemon on a GPU: the engine's test, the pipeline without gRPC, every number of its replies
# against FP64, and a load over a unix socket with 43 layers in turn. Needs no compiler:
#
#     deploy/bundle.sh build/bundle            where nvcc is
#     tests/gpu/daemon.sh build/bundle         where the GPU is
set -euo pipefail
bundle=$(readlink -f "${1:?usage: tests/gpu/daemon.sh BUNDLE}")
work=$(mktemp -d)
trap 'kill "${daemon:-}" 2>/dev/null || true; rm -rf "$work"' EXIT

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
"$bundle/test_engine_cuda" 2>&1 | grep -vE 'SEED|captured'
status=0
"$bundle/pipeline" || status=1 # a bar that is missed stops nothing here

"$bundle/einsumctl" make-checkpoint --model v4-flash "$work/checkpoint"
cat >"$work/einsumd.json" <<JSON
{"engine": "cuda", "listen": ["unix:$work/einsumd.sock"],
 "batch_tokens_max": 8192, "request_tokens_max": 8192,
 "weights_roots": ["$work"], "weights": [{"path": "checkpoint"}],
 "ropes": [{"weights": "*", "theta": 10000}]}
JSON
"$bundle/einsumd" --config "$work/einsumd.json" 2>"$work/log" &
daemon=$!
export EINSUMD_ENDPOINT=unix:$work/einsumd.sock
for _ in $(seq 100); do
    "$bundle/einsumctl" health >/dev/null 2>&1 && break
    sleep 0.2
done
cat "$work/log"
"$bundle/einsumctl" check --checkpoint "$work/checkpoint" --weights 2 --tokens 1,8,64,300 || status=1
"$bundle/einsumctl" check --checkpoint "$work/checkpoint" --weights 2 --tokens 1,8,64,300 --attention ||
    status=1
"$bundle/einsumctl" selftest | tail -1 || status=1
load() { # tokens, requests in flight, further options
    echo "== $1 tokens, $2 in flight ${*:3}"
    "$bundle/einsumctl" bench --tokens "$1" --concurrency "$2" --connections 4 --duration 3 \
        --warmup 1 "${@:3}" | grep -E '^(calls|latency|batches|phases|server|errors)'
}
for tokens in 1 8 32 256; do
    load $tokens 1
    load $tokens 32
done
load 32 32 --attention
"$bundle/einsumctl" info | grep -E '^(requests|batches|memory|graphs)'
kill -TERM "$daemon"
wait "$daemon"
echo "drained, exit status 0"
exit $status
