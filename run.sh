#!/usr/bin/env bash
# The whole method: environment, denoiser, every arm, probes, report. Give the same command again to go on.
set -euo pipefail
usage() {
  cat <<'TEXT'
bash run.sh                    demonstration on built-in images (runs/demo), about 13 minutes on two CPU cores
bash run.sh test [flags]       the test suite; or a part of it, by flags of pytest: -k noise
bash run.sh --data DIR [options] [-- any other pretrain.py flag]
  --data DIR        DIR/train/<class>/*, DIR/val/<class>/*; or any folder of images (pretraining only)
  --noise SPEC      synthetic noise: gauss100, shot3, speckle0.4, rician60, impulse0.3, gauss50-255; none (default):
                    the images are noisy already
  --preset NAME     tiny (64 x 64 images, laptop), imagenet100 (default), imagenet1k, demo
  --arms "A B"      of random noisy denoised nc nct clean (default: all; without clean where --noise is none)
  --seeds "0 1 2"   pretraining seeds (default 0)
  --gpus N          processes, one a GPU (default 1: the GPU if there is one, else the CPU)
  --denoised DIR    your own denoised images, same relative paths, instead of Neighbor2Neighbor's
  --out DIR         default runs/<name of the data folder>
TEXT
}
fail() { echo "error: $*" >&2; exit 2; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data='' noise='' preset='' arms='' seeds=0 gpus=1 denoised='' out='' mode=run extra=()
[ "${1-}" = test ] && { mode=test; shift; }
while [ $mode = run ] && [ $# -gt 0 ]; do
  case $1 in
    --data|--noise|--preset|--arms|--seeds|--gpus|--denoised|--out)
      [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value"
      printf -v "${1#--}" %s "$2"; shift 2 ;;
    --) shift; extra=("$@"); break ;;
    -h|--help) usage; exit 0 ;;
    *) usage >&2; fail "unknown argument $1" ;;
  esac
done
for flag in ${extra[@]+"${extra[@]}"}; do
  case ${flag%%=*} in  # every run would be the same one, or the stages would differ in their images
    --arm|--curriculum|--seed|--out|--fork) fail "-- $flag: differs from run to run; use --arms, --seeds, --out, or pretrain.py itself" ;;
    --data|--noise|--noise_seed|--preset|--denoised) fail "-- $flag: is for all stages; give it before --, or run the stages one by one" ;;
  esac
done

# OpenMP threads that spin for long slow a shared machine down many times over; ones that never spin, an idle one by a fifth
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
# glibc: large tensors in huge pages; pretraining, whose tensors have the same sizes every step, also keeps freed memory
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
keep=$GLIBC_TUNABLES:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184

# ==== environment: this python if it has the packages (an accelerator's own torch is used as it is), else .venv ====
has() { "$1" -c 'import sys, importlib.util as u; sys.exit(None in map(u.find_spec, sys.argv[1:]))' $2 2>/dev/null; }
packages="torch numpy tqdm PIL"
python=$(command -v python3 || command -v python) || fail "python3 is not installed"
if ! has "$python" "$packages" || { [ $mode = test ] && ! has "$python" pytest; }; then
  system=$(has "$python" "$packages" && echo --system-site-packages || true)
  "$here/.venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv $system "$here/.venv"
  python=$here/.venv/bin/python
  has "$python" "$packages" || { echo "installing requirements.txt into .venv"; "$python" -m pip install -q --disable-pip-version-check -r "$here/requirements.txt"; }
  [ $mode = run ] || has "$python" "pytest pytest_cov" || "$python" -m pip install -q pytest pytest-cov
fi
if [ $mode = test ]; then
  cd "$here"
  # the whole suite also says which lines it ran
  [ $# -gt 0 ] || ! has "$python" pytest_cov || set -- --cov --cov-report=term-missing --cov-fail-under=90
  exec "$python" -m pytest "$@"
fi

# ==== defaults and checks ====
if [ -z "$data" ]; then
  out=${out:-runs/demo} data=${out:-runs/demo}/data noise=${noise:-gauss100} preset=${preset:-demo}
  echo "demonstration data: $("$python" "$here/tests/shapes.py" "$data")"
fi
noise=${noise:-none} preset=${preset:-imagenet100} out=${out:-runs/$(basename "$data")}
[ -n "$arms" ] || { arms="random noisy denoised nc nct"; [ "$noise" = none ] || arms="$arms clean"; }
for arm in $arms; do
  case $arm in
    random|noisy|denoised|nc|nct) ;;
    clean) [ "$noise" != none ] || fail "--arms clean: with --noise none no clean images are known" ;;
    *) fail "--arms $arm: unknown; use random noisy denoised nc nct clean" ;;
  esac
done
case $preset in demo|tiny|imagenet100|imagenet1k) ;; *) fail "--preset $preset: use demo, tiny, imagenet100 or imagenet1k" ;; esac
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "--gpus $gpus: must be a whole number from 1"
[[ $seeds =~ ^[0-9]+(\ +[0-9]+)*$ ]] || fail "--seeds $seeds: must be whole numbers"
[ -d "$data" ] || fail "--data $data: no such folder"
if [ "$gpus" -gt 1 ]; then
  found=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  [ "$found" -ge "$gpus" ] || fail "--gpus $gpus: this machine has $found CUDA devices"
fi
processes() {  # how the next stages are started
  launch=("$python")
  [ "$1" -eq 1 ] || launch+=(-m torch.distributed.run --standalone --nproc_per_node "$1" --)
}

# ==== one stage after the other; a signal reaches the stage, which saves; then this script ends with 75 ====
child='' stopped=''
trap 'stopped=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT HUP USR1
stage() {
  [ -z "$stopped" ] || exit 75
  echo "== $* =="
  "$@" & child=$!
  [ -z "$stopped" ] || kill -TERM "$child" 2>/dev/null || true
  local code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done
  child=''
  [ -z "$stopped" ] || exit 75
  [ $code -eq 0 ] || exit $code
}
common=(--data "$data" --noise "$noise" --preset "$preset")
probes=''
if [ -d "$data/train" ] && [ -d "$data/val" ]; then
  probes=yes
  stage "$python" "$here/probe.py" check "${common[@]}" --run none --out none
else
  echo "no train/ and val/ in $data: pretraining without probes"
fi
mkdir -p "$out" 2>/dev/null && [ -w "$out" ] || fail "--out $out: cannot be written"
if command -v flock >/dev/null; then  # a process left by a killed run may still be writing: let it end
  exec 9>"$out/.lock"
  flock -n 9 || { echo "waiting for another run in $out"; stage flock 9; }
fi

if [[ " $arms " =~ \ (denoised|nc|nct)\  ]] && [ -z "$denoised" ]; then
  denoised=$out/denoised
  few=$gpus batch=4  # the denoiser's, of which each process takes a part
  [ "$preset" != imagenet1k ] || batch=8
  while [ $((batch % few)) -ne 0 ]; do few=$((few - 1)); done
  processes $few
  stage "${launch[@]}" "$here/denoise.py" train "${common[@]}" --out "$out/denoiser"
  processes "$gpus"
  stage "${launch[@]}" "$here/denoise.py" apply "${common[@]}" --denoiser "$out/denoiser" --out "$denoised"
fi

processes "$gpus"
pretrain() {  # arm, then more flags
  local arm=$1 run=$out/pretrain/$1-seed$seed; shift
  GLIBC_TUNABLES=$keep stage "${launch[@]}" "$here/pretrain.py" "${common[@]}" --arm "$arm" --seed "$seed" --out "$run" "$@" ${extra[@]+"${extra[@]}"}
}
probe() {
  local arm=$1 run=$out/pretrain/$1-seed$seed result=$out/probe/$1-seed$seed.json flags=()
  [ -n "$probes" ] || return 0
  [ "$arm" != clean ] || flags=(--noise none)  # probe and test see what pretraining saw: the upper bound, clean images
  [ "$arm" != denoised ] || flags=(--denoised "$denoised")
  [ "$arm" != denoised ] || [ ! -d "$out/denoiser" ] || flags+=(--denoiser "$out/denoiser")
  stage "${launch[@]}" "$here/probe.py" "${common[@]}" --run "$run" --out "$result" ${flags[@]+"${flags[@]}"}
}
for seed in $seeds; do
  # the denoised arm and the first phase of nc and nct are one run: it is trained once, the three go on from it
  fork=(--denoised "$denoised" --fork "$out/pretrain/phase1-seed$seed/checkpoint.pth")
  [[ ! " $arms " =~ \ (denoised|nc|nct)\  ]] || pretrain phase1 --denoised "$denoised"
  for arm in $arms; do
    case $arm in
      random|noisy|clean) pretrain "$arm" ;;
      denoised|nc) pretrain "$arm" "${fork[@]}" ;;
      nct)
        anchor=()
        if [ "$preset" = imagenet1k ]; then  # the paper's anchor there is the finished denoised teacher
          pretrain denoised "${fork[@]}"
          anchor=(--anchor_from "$out/pretrain/denoised-seed$seed/checkpoint.pth")
        fi
        pretrain nct "${fork[@]}" ${anchor[@]+"${anchor[@]}"} ;;
    esac
    probe "$arm"
  done
done
[ -z "$probes" ] || stage "$python" "$here/probe.py" report "$out"
