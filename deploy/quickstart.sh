#!/bin/bash
# From a checkout to a checked answer: builds einsumd, makes a checkpoint of made-up weights in the
# shape of DeepSeek-V4-Flash, serves it, sends requests and compares every number of the replies
# with a reference in FP64.
#
#     deploy/quickstart.sh
#
# Minutes the first time, seconds from then on. Everything is left in build/quickstart/.
set -euo pipefail
cd "$(dirname "$0")/.."

bin=build/release
work=build/quickstart
checkpoint=$work/checkpoint
mkdir -p "$work"

say() { printf '\n== %s\n' "$*"; }

# run_logged LOG COMMAND...: quietly, and with the end of the log if it fails.
run_logged() {
    local log=$1
    shift
    if ! "$@" >"$log" 2>&1; then
        echo "failed: $*; the end of $log:" >&2
        tail -40 "$log" >&2
        exit 1
    fi
}

daemon=
socket_dir=
cleanup() {
    local status=$?
    if [ -n "$daemon" ]; then
        kill -KILL "$daemon" 2>/dev/null || true
        wait "$daemon" 2>/dev/null || true
    fi
    [ -n "$socket_dir" ] && rm -rf "$socket_dir"
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# The first loopback port from 50061 on that nobody listens on.
free_port() {
    local port
    for ((port = 50061; port < 50161; port++)); do
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            return
        fi
    done
    echo "no free port from 50061 to 50160 on 127.0.0.1" >&2
    return 1
}

json_string() {
    local text=${1//\\/\\\\}
    printf '"%s"' "${text//\"/\\\"}"
}

# One token of V4-Flash, all ones (E4M3 0x38) at scale one (UE8M0 0x7f), answered by a digest.
write_request() {
    local ones scales
    ones=$(head -c 32768 /dev/zero | tr '\0' '\070' | base64 -w 0)
    scales=$(head -c 256 /dev/zero | tr '\0' '\177' | base64 -w 0)
    cat <<JSON
{
  "weight": "layers.0.attn.wo_a",
  "equation": "bhr,hdr->bhd",
  "recipe": "RECIPE_1_128_128",
  "activation_layout": "ACTIVATION_LAYOUT_TGR",
  "scale_layout": "SCALE_LAYOUT_TGK",
  "scale_type": "SCALE_TYPE_UE8M0",
  "output_type": "OUTPUT_TYPE_BF16",
  "tokens": 1,
  "digest_only": true,
  "activations": "$ones",
  "activation_scales": "$scales"
}
JSON
}

say "dependencies"
deploy/install-dependencies.sh

say "build: $bin"
[ -f "$bin/build.ninja" ] || run_logged "$work/configure.log" cmake --preset release
run_logged "$work/build.log" cmake --build "$bin" --target einsumd einsumctl
"$bin/einsumd" --version

say "checkpoint: 4 layers of V4-Flash, 134 MB, in $checkpoint"
if [ -f "$checkpoint/model.safetensors.index.json" ]; then
    echo "there already"
else
    "$bin/einsumctl" make-checkpoint --model v4-flash --layers 4 --shards 2 "$checkpoint"
fi

port=$(free_port)
socket=$PWD/$work/einsumd.sock
if [ ${#socket} -gt 107 ]; then # what the kernel takes
    socket_dir=$(mktemp -d)
    socket=$socket_dir/einsumd.sock
fi
config=$work/einsumd.json
cat >"$config" <<JSON
{
  "listen": ["127.0.0.1:$port", $(json_string "unix:$socket")],
  "weights_roots": [$(json_string "$PWD/$work")],
  "weights": [{"path": $(json_string "$PWD/$checkpoint")}]
}
JSON

say "start: $bin/einsumd --config $config"
"$bin/einsumd" --config "$config" 2>"$work/einsumd.log" &
daemon=$!
deadline=$((SECONDS + 120))
until "$bin/einsumctl" --endpoint "127.0.0.1:$port" health >"$work/health.log" 2>&1; do
    if ! kill -0 "$daemon" 2>/dev/null || [ $SECONDS -ge $deadline ]; then
        echo "einsumd did not become ready; the end of $work/einsumd.log:" >&2
        tail -40 "$work/einsumd.log" >&2
        exit 1
    fi
    sleep 0.1
done
cat "$work/health.log"
echo "listening on 127.0.0.1:$port and unix:$socket; log in $work/einsumd.log"

say "check: every number of the replies, over TCP and over the unix socket"
"$bin/einsumctl" --endpoint "127.0.0.1:$port" check --checkpoint "$checkpoint" --tokens 1,8,64
"$bin/einsumctl" --endpoint "unix:$socket" check --checkpoint "$checkpoint" --tokens 1,8,64

say "the same service with grpcurl"
write_request >"$work/request.json"
call=(grpcurl -plaintext -d @ "127.0.0.1:$port" einsum.v1.Einsum/Einsum)
self_test=(grpcurl -plaintext "127.0.0.1:$port" einsum.v1.Einsum/SelfTest)
if command -v grpcurl >/dev/null; then
    "${self_test[@]}"
    "${call[@]}" <"$work/request.json"
else
    echo "grpcurl is not installed; with it, and the daemon started as above:"
fi
echo "    ${self_test[*]}"
echo "    ${call[*]} < $work/request.json"

say "stop: SIGTERM"
kill -TERM "$daemon"
status=0
wait "$daemon" || status=$?
daemon=
if [ "$status" -ne 0 ]; then
    echo "einsumd ended with status $status, expected 0; the end of $work/einsumd.log:" >&2
    tail -40 "$work/einsumd.log" >&2
    exit 1
fi
echo "einsumd drained and ended with status 0"
