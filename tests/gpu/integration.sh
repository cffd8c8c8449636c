#!/bin/bash
# The integration tests of all that an engine computes, against the CUDA engine. Needs no compiler, and of
# Python what the bundle has brought along:
#
#     deploy/bundle.sh --wheels 3.12 build/bundle                  where nvcc is
#     FOLDER/tests/gpu/integration.sh [pytest's arguments ...]     where the GPU is, and Python 3.12
#
# Prints each failure as it comes, and all of their texts at the end.
set -euo pipefail
bundle=$(readlink -f "$(dirname "$(readlink -f "$0")")/../..")
[ -d "$bundle/wheels" ] || {
    echo "no wheels in $bundle: pack it by deploy/bundle.sh --wheels X.Y" >&2
    exit 2
}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install --quiet --root-user-action=ignore --no-index --find-links "$bundle/wheels" --target "$site" "$bundle"/wheels/*.whl

files=()
for name in numbers kernels large_requests output_project shared_memory bad_input fairness ctl services; do
    files+=("$bundle/tests/integration/test_$name.py")
done
PYTHONPATH=$site EINSUMD_TEST_ENGINE=${EINSUMD_TEST_ENGINE:-cuda} EINSUMD_BUILD_DIR=$bundle \
    python3 -m pytest "${files[@]}" -q -p no:cacheprovider -rfEs --tb=short "$@"
