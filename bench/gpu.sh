#!/usr/bin/env bash
# Everything that only a GPU can show, in one call: build in place, tests, benches, compute-sanitizer.
#
#     bench/gpu.sh                     # results into bench/results
#     OUT=/tmp/results bench/gpu.sh
#     bench/gpu.sh tests executors     # only these steps; the build stays from call to call
#     LIMIT=580 bench/gpu.sh           # done in that many seconds: a step is cut short, and what is left is left out
#
# All steps together may take three quarters of an hour. Where a call must end sooner, share them among several, what must
# hold before what is measured:
#
#     LIMIT=560 bench/gpu.sh build tests-executors tests triton
#     LIMIT=540 bench/gpu.sh memcheck racecheck executors executors-gpt cli
#     LIMIT=540 bench/gpu.sh bench executors-nhwc bench-compiled chunk-4096 chunk-16384 chunk-32768
#
# The built module is among the results: on another machine of this kind, put into layerpipe_kernels/, it saves the build.
#
# Needs torch with CUDA, Triton, nvcc, g++, cmake, ninja, pybind11 and pytest; no network. PYTHON names the interpreter.
# What a step lacks besides is said at the beginning, and the others run. All that they print is in gpu.log.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
out=${OUT:-bench/results}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
log=$out/gpu.log
: >"$log"
failed=()
chosen=" $* "
ran=" "

# The steps in the order of their worth, each with its own time: what is done when time runs out still counts.
run() { # name, seconds, command...
    local name=$1 seconds=$2 begin=$SECONDS
    shift 2
    [[ $chosen == "  " || $chosen == *" $name "* ]] || return 0
    ran+="$name "
    local left=$((${LIMIT:-86400} - SECONDS - 10))
    ((left < 20)) && failed+=("$name: no time left") && return
    echo "==> $name" | tee -a "$log"
    local before
    before=$(wc -c <"$log")
    # An interrupt, not a kill: pytest then still prints the failures that it has seen.
    timeout -s INT -k 20 $((seconds < left ? seconds : left)) "$@" >>"$log" 2>&1
    local status=$?
    ((status)) && failed+=("$name ($status)")
    tail -c "+$((before + 1))" "$log" | tail -n "${TAIL:-12}"
    echo "    $name: exit $status, $((SECONDS - begin)) s"
}

has() {
    "$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec(sys.argv[1]))' "$1"
}

"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name())' || exit 1
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv | tee -a "$log"
for module in setuptools cmake ninja pybind11 triton pytest hypothesis networkx numpy rich matplotlib torchvision typer sklearn; do
    has "$module" || echo "==> $python has no $module"
done
pytest=("$python" -m pytest -q --tb=short -o faulthandler_timeout=60)
has pytest_timeout && pytest+=(--timeout=240)
# In several processes also because a device's error, or a capture that failed, stays with its process.
parallel() { has xdist && echo -n "$1"; }

arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
LAYERPIPE_CUDA_ARCHS="$arch" run build 180 "$python" setup.py -q build_ext --inplace
[[ -n ${OUT:-} && $ran == *" build "* ]] && cp layerpipe_kernels/_C.*.so "$out"
"$python" -c 'import layerpipe_kernels as lk; print(lk.build_info())' 2>&1 | tee -a "$log"
((PIPESTATUS[0])) && exit 1
"$python" -c 'import layerpipe_kernels as lk; assert "cuda" in lk.available_backends()' 2>/dev/null || failed+=("no CUDA kernels")

device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
# shellcheck disable=SC2046  # two words or none
run tests-executors 180 "${pytest[@]}" $(parallel "-n 4") tests/gpu/test_executors_gpu.py
run tests 300 "${pytest[@]}" $(parallel "-n 8") tests/gpu --ignore=tests/gpu/test_executors_gpu.py
run triton 240 "${pytest[@]}" $(parallel "-n 8") tests/kernels/triton_*_cases.py
if command -v compute-sanitizer >/dev/null; then
    # Every tensor in an allocation of its own: beyond its end lies nothing that may be touched.
    sanitized=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9)
    # Not calls that fail: torch tries some that may.
    run memcheck 240 "${sanitized[@]}" --tool memcheck --report-api-errors no "$python" -m tests.gpu.sanitize
    run racecheck 150 "${sanitized[@]}" --tool racecheck "$python" -m tests.gpu.sanitize
else
    echo "==> no compute-sanitizer on the PATH"
fi
TAIL=40 run executors 300 "$python" -m bench.executors --json "$out/$device-executors.json"
TAIL=40 run executors-nhwc 200 "$python" -m bench.executors --channels-last --batch 128 --rounds 5 \
    --json "$out/$device-executors-nhwc.json"
TAIL=60 run bench 300 "$python" -m bench.step --device cuda --no-compile --rounds 7 --seconds 0.05 \
    --json "$out/$device-step.json" --plot "$out/$device-step.png"
TAIL=40 run bench-compiled 240 "$python" -m bench.step --device cuda --networks resnet18 --optimizers sgd --max-bytes 1e8 \
    --rounds 5 --seconds 0.05 --json "$out/$device-step-compiled.json"
TAIL=40 run executors-gpt 200 "$python" -m bench.executors --network gpt:256 --size 128 --batch 8 32 \
    --json "$out/$device-executors-gpt.json"
for chunk in 4096 16384 32768; do
    run "chunk-$chunk" 60 "$python" -m bench.step --device cuda --chunk "$chunk" --no-compile --networks '' --optimizers sgd \
        --dtypes fp32 --rounds 5 --seconds 0.05 --json "$out/$device-step-chunk-$chunk.json"
done
TAIL=40 run cli 90 "$python" -m layerpipe.cli train --device cuda --executor graphs --steps 300 --profile \
    --out "${TMPDIR:-/tmp}/layerpipe-run"

for name in "$@"; do
    [[ $ran == *" $name "* ]] || failed+=("$name: no such step")
done
if ((${#failed[@]})); then
    echo "==> failed: ${failed[*]}"
    exit 1
fi
echo "==> all passed; results in $out"
