#!/usr/bin/env bash
# What only a GPU can show, as bench/gpu.py says: tests, then measurements, in a call of at most 440 s and one of 180 s.
#
#     bench/gpu.sh --call 1 && bench/gpu.sh --call 2
#     bench/gpu.sh --call 1 --dry-run    # without a GPU: each step as far as the CPU takes it
#
# The kernels are best built beforehand, where nvcc is and with the Python of the GPU's machine, twice: as they are, and
# with two blocks per multiprocessor everywhere, to be compared with them:
#
#     bench/gpu.sh build                 # into build/gpu and build/gpu/variant
#
# Needs torch with CUDA, Triton and pytest; what else a step needs and is not there is said at the end. PYTHON names the
# interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
if [[ ${1:-} != build ]]; then
    exec "$python" -m bench.gpu "$@"
fi
export LAYERPIPE_CUDA_ARCHS=${LAYERPIPE_CUDA_ARCHS:-90-real}
for kind in . variant; do
    mkdir -p "build/gpu/$kind"
    [[ $kind == variant ]] && export CUDAFLAGS="${CUDAFLAGS:-} -DLP_BLOCKS=2"
    "$python" setup.py -q build_ext --build-lib "build/gpu/lib"
    cp build/gpu/lib/layerpipe_kernels/_C.*.so "build/gpu/$kind/"
done
ls -l build/gpu/_C.*.so build/gpu/variant/_C.*.so
