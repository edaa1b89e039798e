#!/usr/bin/env bash
# Everything that only a GPU can show, in one call: build in place, tests, benches, compute-sanitizer.
#
#     bench/gpu.sh                     # results into bench/results
#     OUT=/tmp/results bench/gpu.sh
#     bench/gpu.sh tests executors     # only these steps; the build stays from call to call
#
# Needs torch with CUDA, Triton, nvcc, cmake, ninja, pybind11 and pytest; no network. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
out=${OUT:-bench/results}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/python"
failed=()
chosen=" $* "
ran=" "

# The steps in the order of their worth, each with its own time: what is done when time runs out still counts.
run() { # name, seconds, command...
    local name=$1 seconds=$2 begin=$SECONDS
    shift 2
    [[ $chosen == "  " || $chosen == *" $name "* ]] || return 0
    ran+="$name "
    echo "==> $name"
    timeout "$seconds" "$@" >"$out/gpu-$name.log" 2>&1
    local status=$?
    ((status)) && failed+=("$name ($status)")
    tail -n "${TAIL:-12}" "$out/gpu-$name.log"
    echo "    $name: exit $status, $((SECONDS - begin)) s"
}

"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name())' || exit 1
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv | tee "$out/gpu-device.csv"

arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
LAYERPIPE_CUDA_ARCHS="$arch" run build 180 "$python" setup.py -q build_ext --inplace
"$python" -c 'import layerpipe_kernels as lk; print(lk.build_info())' || exit 1

device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
run tests 180 "$python" -m pytest -q --timeout=120 tests/gpu
run triton 120 "$python" -m pytest -q --timeout=100 tests/kernels/triton_*_cases.py
TAIL=60 run bench 240 "$python" -m bench.step --device cuda --rounds 7 --seconds 0.1 \
    --json "$out/$device-step.json" --plot "$out/$device-step.png"
TAIL=40 run executors 200 "$python" -m bench.executors --json "$out/$device-executors.json"
TAIL=40 run executors-gpt 120 "$python" -m bench.executors --network gpt:256 --size 128 --batch 8 32 \
    --json "$out/$device-executors-gpt.json"
for chunk in 4096 16384 32768; do
    run "chunk-$chunk" 60 "$python" -m bench.step --device cuda --chunk "$chunk" --no-compile --networks '' --optimizers sgd \
        --dtypes fp32 --rounds 5 --seconds 0.1 --json "$out/$device-step-chunk-$chunk.json"
done
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        run "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m tests.gpu.sanitize
    done
else
    echo "==> no compute-sanitizer on the PATH"
fi

for name in "$@"; do
    [[ $ran == *" $name "* ]] || failed+=("$name: no such step")
done
if ((${#failed[@]})); then
    echo "==> failed: ${failed[*]}"
    exit 1
fi
echo "==> all passed; results in $out"
