#!/bin/bash
# Memory that callers share with a daemon on a GPU: numbers through shared host memory and through CUDA
# memory, refusals, callers that die; then what each way costs, without MPS and with it. Needs no
# compiler; goes on after what fails, and keeps every step's output in FOLDER:
#
#     deploy/bundle.sh build/bundle                     where nvcc is
#     tests/gpu/regions.sh build/bundle [FOLDER]        where the GPU is
set -u
bundle=$(readlink -f "${1:?usage: tests/gpu/regions.sh BUNDLE [FOLDER]}")
work=$(mktemp -d)
kept=${2:-$work}
mkdir -p "$kept"
daemon=
trap 'kill $daemon 2>/dev/null; stop_mps; rm -rf "$work"' EXIT
status=0

stop_mps() {
    [ -n "${CUDA_MPS_PIPE_DIRECTORY:-}" ] || return 0
    echo quit | timeout 20 nvidia-cuda-mps-control >/dev/null 2>&1
    unset CUDA_MPS_PIPE_DIRECTORY
}

start() { # name
    log=$kept/$1.daemon.log
    "$bundle/einsumd" --config "$work/einsumd.json" 2>"$log" &
    daemon=$!
    for _ in $(seq 300); do
        "$bundle/einsumctl" health >/dev/null 2>&1 && return 0
        kill -0 $daemon 2>/dev/null || break
        sleep 0.2
    done
    echo "FAILED: $1: the daemon does not come up"
    tail -20 "$log"
    status=1
    return 1
}

stop() { # name
    kill -TERM $daemon
    timeout 30 tail --pid=$daemon -f /dev/null
    wait $daemon
    echo "$1: the daemon's exit status is $?"
    daemon=
    grep -E ' (warn|error) ' "$log" | head -20
}

step() { # name, seconds, command...
    echo "== $1"
    timeout -k 5 "$2" "${@:3}" >"$kept/$1.out" 2>&1
    local rc=$?
    [ $rc = 0 ] || status=1
    tail -n 90 "$kept/$1.out"
    echo "$1: exit status $rc"
}

nvidia-smi --query-gpu=name,driver_version,compute_mode --format=csv,noheader
"$bundle/einsumctl" make-checkpoint --model v4-flash --layers 8 "$work/checkpoint" | tail -1
cat >"$work/einsumd.json" <<JSON
{"engine": "cuda", "listen": ["unix:$work/einsumd.sock"],
 "shared_memory_listen": "unix:$work/shared.sock", "shared_memory_cuda": true,
 "shared_region_bytes_max": 2147483648, "shared_bytes_max": 17179869184,
 "weights_roots": ["$work"], "weights": [{"path": "checkpoint"}],
 "ropes": [{"weights": "*", "theta": 10000}]}
JSON
export EINSUMD_ENDPOINT=unix:$work/einsumd.sock

if start plain; then
    for transport in grpc shm ring; do
        step fp64-$transport 40 "$bundle/einsumctl" check --checkpoint "$work/checkpoint" \
            --weights 2 --repeat 1 --tokens 1,8,64,300 --transport $transport
        step fp64-attention-$transport 40 "$bundle/einsumctl" check --checkpoint \
            "$work/checkpoint" --weights 2 --repeat 1 --tokens 1,8,64,300 --attention \
            --transport $transport
    done
    step check 100 "$bundle/regions" check "$EINSUMD_ENDPOINT"
    "$bundle/einsumctl" info | grep -E '^(shared|requests)'
    step bench 130 "$bundle/regions" bench "$EINSUMD_ENDPOINT" 0.3
    stop plain
fi

if command -v nvidia-cuda-mps-control >/dev/null; then
    export CUDA_MPS_PIPE_DIRECTORY=$work/mps CUDA_MPS_LOG_DIRECTORY=$kept/mps
    mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
    if nvidia-cuda-mps-control -d && start mps; then
        echo get_server_list | timeout 10 nvidia-cuda-mps-control | sed 's/^/mps server: /'
        step mps-bench 130 "$bundle/regions" bench "$EINSUMD_ENDPOINT" 0.3
        step mps-check 80 "$bundle/regions" check "$EINSUMD_ENDPOINT" # kills callers: last
        stop mps
    else
        echo "SKIPPED: MPS, which does not start here"
        cat "$CUDA_MPS_LOG_DIRECTORY"/*.log 2>/dev/null | tail -20
    fi
    stop_mps
else
    echo "SKIPPED: MPS, there is no nvidia-cuda-mps-control"
fi

# Last, since the device may be lost.
if start careless; then
    step careless 30 "$bundle/regions" careless "$EINSUMD_ENDPOINT"
    stop careless
fi
for result in bench mps-bench; do
    grep -h '^RESULT' "$kept/$result.out" 2>/dev/null | sed "s/\"regions\"/\"$result\"/"
done
exit $status
