#!/bin/sh
# What the kernels for SM 12.0 and 12.1 must be, seen without a GPU: block-scaled mma in decode and
# prefill, and in them and in attention no local memory, no spill, shared memory within what that
# capability has. Needs nvcc 13 and cuobjdump (PATH, or CUOBJDUMP). Prints a table, RESULT last.
#
#     tests/gpu/check_static.sh
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
command -v nvcc > /dev/null || PATH=$PATH:/usr/local/cuda/bin
cuobjdump=${CUOBJDUMP:-cuobjdump}
command -v "$cuobjdump" > /dev/null || {
    echo "check_static: no cuobjdump: set CUOBJDUMP" >&2
    exit 1
}

for source in attention decode prefill; do
    nvcc -std=c++17 -O3 -gencode arch=compute_120f,code=sm_120 -Xptxas -v -cubin \
        -o "$build/$source.cubin" "$root/kernels/cuda/$source.cu" 2>> "$build/ptxas" || {
        cat "$build/ptxas" >&2
        exit 1
    }
    "$cuobjdump" --dump-sass "$build/$source.cubin" >> "$build/sass"
done
# Dynamic shared memory is no property of a cubin: the sources assert it, and say the bound here.
sed -n 's/.*CUDA_SMEM_BYTES_MAX = \([0-9]*\).*/\1/p' "$root/kernels/cuda/table.h" > "$build/smem"
grep -q 'static_assert(sizeof(decode_smem<8>) <= CUDA_SMEM_BYTES_MAX' "$root/kernels/cuda/decode.cuh"
grep -q 'static_assert(sizeof(prefill_smem) <= 49 \* 1024' "$root/kernels/cuda/prefill.cu"

python3 - "$build" << 'PYTHON'
import json
import re
import sys
from collections import Counter
from pathlib import Path

build = Path(sys.argv[1])
LIMIT = 101376
opcodes: dict[str, Counter] = {}
name = ""
for line in (build / "sass").read_text().splitlines():
    if found := re.search(r"Function : (\S+)", line):
        name = found[1]
        opcodes[name] = Counter()
    elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
        opcodes[name][found[1]] += 1

registers, spills = {}, {}
for line in (build / "ptxas").read_text().splitlines():
    if found := re.search(r"(?:entry function|properties for) '?(\S+?)'?(?: for|$)", line):
        name = found[1]
    elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
        spills[name] = (int(found[1]), int(found[2]))
    elif found := re.search(r"Used (\d+) registers", line):
        registers[name] = int(found[1])

rows, ok = [], int((build / "smem").read_text()) <= LIMIT
print(f"{'kernel':<16} {'registers':>9} {'stack':>6} {'spilled':>8} {'QMMA.SF':>8} {'QMMA':>6} "
      f"{'HMMA':>6} {'local':>6} {'all':>7}")
for mangled, count in sorted(opcodes.items()):
    found = re.search(r"(attention|decode|prefill)_kernel(?:IL\w+?formE(\d)ELi(\d+)E)?", mangled)
    if not found:
        continue
    short = found[1]
    if found[2]:
        short += f"<{['ue8m0', 'fp32', 'any'][int(found[2])]}, {found[3]}>"
    scaled = sum(n for op, n in count.items() if op.startswith("QMMA.SF"))
    plain = sum(n for op, n in count.items() if op.startswith("QMMA") and not op.startswith("QMMA.SF"))
    half = sum(n for op, n in count.items() if op.startswith("HMMA"))
    local = sum(n for op, n in count.items() if op.startswith(("LDL", "STL")))
    stack, spilled = spills[mangled]
    multiplies = found[1] != "attention"
    good = (scaled > 0) == multiplies and plain == 0 and local == 0 and stack == 0 and spilled == 0
    ok = ok and good
    print(f"{short:<16} {registers[mangled]:>9} {stack:>6} {spilled:>8} {scaled:>8} {plain:>6} "
          f"{half:>6} {local:>6} {sum(count.values()):>7}{'' if good else '   NOT GOOD'}")
    rows.append({"kernel": short, "registers": registers[mangled], "stack": stack, "spilled": spilled,
                 "qmma_sf": scaled, "local": local, "ok": good})
ok = ok and len(rows) == 3 * 4 + 2  # decode: forms and sizes; prefill; attention
print("RESULT", json.dumps({"bench": "gpu_static", "smem_limit": LIMIT, "rows": rows, "ok": ok}))
sys.exit(0 if ok else 1)
PYTHON
