#!/usr/bin/env bash
# The whole method: environment, denoiser, every arm, probes, report. To go on, give the same command again.
set -euo pipefail
usage() {
  cat <<'TEXT'
bash run.sh                    demonstration on built-in images (runs/demo), 12 to 14 minutes on two CPU cores
bash run.sh test [flags]       the test suite; or a part of it, by flags of pytest: -k noise
bash run.sh --data DIR [options] [-- any other pretrain.py flag]
  --data DIR        DIR/train/<class>/*, DIR/val/<class>/*; or any folder of images (pretraining only)
  --noise SPEC      synthetic noise: gauss100, shot3, speckle0.4, rician60, impulse0.3, camera30,5, gauss50-255;
                    none (default): the images are noisy already
  --range LOW,HIGH  values of files deeper than 8 bit that become black and white (default: measured)
  --preset NAME     tiny (64 x 64 images, laptop), small (1,000 to 50,000 images of 64 to 256 pixels), imagenet100 (default),
                    imagenet1k, demo
  --arms "A B"      of random noisy denoised nc nct clean (default: all; without clean where --noise is none)
  --seeds "0 1 2"   pretraining seeds (default 0)
  --gpus N          processes, one a GPU (default 1: the GPU if there is one, else the CPU)
  --stride V,H      of the denoiser where noise is correlated: every V-th row, H-th column (default: measured)
  --denoised DIR    your own denoised images, same relative paths, instead of Neighbor2Neighbor's
  --shots 5,10,20   probe on so few labels a class, too
  --img_size N      pixels of the short side at which images are probed (default: the preset's)
  --out DIR         default runs/<name of the data folder>
After --, --epochs is the length of every arm and --switch the part of it on denoised images; --anchor, --anchor_head and
--anchor_from are for nct, --init_backbone for the arms that start from random weights; the rest goes to every run.
TEXT
}
fail() { echo "error: $*" >&2; exit 2; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data='' noise='' range='' preset='' arms='' seeds=0 gpus=1 denoised='' stride='' shots='' img_size='' out='' mode=run extra=()
[ "${1-}" = test ] && { mode=test; shift; }
while [ $mode = run ] && [ $# -gt 0 ]; do
  case $1 in
    --data|--noise|--range|--preset|--arms|--seeds|--gpus|--denoised|--stride|--shots|--img_size|--out)
      [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value"
      printf -v "${1#--}" %s "$2"; shift 2 ;;
    --range=*) range=${1#*=}; shift ;;  # as the stages take a negative LOW
    --) shift; extra=("$@"); break ;;
    -h|--help) usage; exit 0 ;;
    *) usage >&2; fail "unknown argument $1" ;;
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

# ==== what pretrain.py gets: flags that shape the curriculum are taken out of those after --, the rest goes to every run ====
epochs='' switch='' anchor='' patch_size='' for_nc='' for_nct='' nct_flags=() first_flags=() flags=()
take() {  # name and value of one flag
  case $1 in
    --epochs) epochs=$2 ;;
    --switch) switch=$2 for_nc=$1 ;;
    --anchor) anchor=$2 for_nct=$1 ;;
    --anchor_head|--anchor_from) nct_flags+=("$1" "$2") for_nct=$1 ;;
    --init_backbone) first_flags+=("$1" "$2") ;;
    --patch_size) patch_size=$2; return 1 ;;  # goes to every run, too
    *) return 1 ;;
  esac
  case $1 in --anchor_from|--init_backbone) [ -e "$2" ] || fail "-- $1 $2: no such file" ;; esac
}
set -- ${extra[@]+"${extra[@]}"}
while [ $# -gt 0 ]; do
  case ${1%%=*} in
    --source|--stop|--init|--seed|--out) fail "-- $1: differs from run to run; use --arms, --seeds, --out, or pretrain.py itself" ;;
    --noise_seed) fail "-- $1: is for all stages; run them one by one" ;;
    --data|--noise|--range|--preset|--denoised) fail "-- $1: is for all stages; give it before --, or run the stages one by one" ;;
  esac
  if [[ $1 == --*=* ]] && take "${1%%=*}" "${1#*=}"; then shift
  elif [ $# -ge 2 ] && take "$1" "$2"; then shift 2
  else flags+=("$1"); shift
  fi
done

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
[ -d "$data" ] || fail "--data $data: no such folder"
# the curriculum of a preset: epochs of an arm, those of them on denoised images, flags of the noisy phase, the anchor's
# weight (the paper's, by noise), the denoiser's batch
case $preset in
  demo) length=12 part=8 noisy_flags=(--warmup_epochs 1) weight=4 batch=16 ;;
  tiny) length=60 part=18 noisy_flags=(--warmup_epochs 1) weight=4 batch=4 ;;
  small)  # 4,000 steps of 64 images, at least 20 epochs
    images=$("$python" "$here/pretrain.py" check --data "$data" --out none) || exit 2
    images=${images% images*} images=${images##* } weight=4 batch=4 noisy_flags=(--warmup_epochs 1)
    length=$((256000 / images)) length=$((length > 20 ? length : 20)) part=$((length * 3 / 10)) ;;
  imagenet100)
    length=200 part=140 noisy_flags=() batch=4
    case $noise in gauss100) weight=4 ;; gauss255) weight=1.1 ;; shot1) weight=5 ;; speckle1|speckle1.0) weight=2 ;; *) weight=1 ;; esac ;;
  imagenet1k)
    length=100 part=30 noisy_flags=(--warmup_epochs 5 --teacher_temp_warmup_epochs 15) batch=8
    case $noise in gauss100) weight=2 ;; gauss255) weight=1.6 ;; *) weight=1 ;; esac ;;
  *) fail "--preset $preset: use demo, tiny, small, imagenet100 or imagenet1k" ;;
esac
epochs=${epochs:-$length} switch=${switch:-$part} anchor=${anchor:-$weight}
[[ $epochs =~ ^[0-9]+$ && $switch =~ ^[0-9]+$ ]] || fail "-- --epochs $epochs --switch $switch: must be whole numbers"
uses() { [[ " $arms " =~ \ ($1)\  ]]; }  # whether one of these arms is asked for
if uses "nc|nct"; then
  [ "$switch" -gt 0 ] && [ "$switch" -lt "$epochs" ] || fail "-- --switch $switch: must be between 0 and --epochs $epochs; give both"
fi
[ -z "$denoised" ] || uses "denoised|nc|nct" || fail "--denoised: none of --arms $arms uses it"
[ -z "$stride" ] || { [ -z "$denoised" ] && uses "denoised|nc|nct"; } || fail "--stride: is for the denoiser, which is not trained here"
[ -z "$denoised" ] || [ -d "$denoised" ] || fail "--denoised $denoised: no such folder"
[ -z "$for_nct" ] || uses nct || fail "-- $for_nct: has no effect without the arm nct"
[ -z "$for_nc" ] || uses "nc|nct" || fail "-- $for_nc: has no effect without the arms nc and nct"
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "--gpus $gpus: must be a whole number from 1"
[[ $seeds =~ ^[0-9]+(\ +[0-9]+)*$ ]] || fail "--seeds $seeds: must be whole numbers"
if [ "$gpus" -gt 1 ]; then
  found=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  [ "$found" -ge "$gpus" ] || fail "--gpus $gpus: this machine has $found CUDA devices"
fi

# ==== one stage after the other; a signal reaches the stage, which saves; then this script ends with 75 ====
child='' stopped='' number=0 total=0 kinds=() last='' commands=/dev/null
trap 'stopped=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT HUP USR1
left() {  # about how long the stages from here on take, by the last one of the same kind that did something
  local seconds=0 kind name
  for kind in "${kinds[@]:number-1}"; do
    name=took_$kind
    case $kind in pretraining|probing) [ -n "${!name-}" ] || return 0 ;; esac
    seconds=$((seconds + ${!name-5}))
  done
  echo ", about $((seconds / 60 + 1)) min left"
}
stage() {  # title, command: run it; or, while the stages are counted, only remember its kind, the title's first word
  local title=$1 kind=${1%% *} began=$SECONDS
  shift
  if [ -n "$counting" ]; then kinds+=("$kind") total=$((total + 1)); return; fi
  [ -z "$stopped" ] || exit 75
  number=$((number + 1))
  echo "== $number/$total $title${last:+ (the last took $last$(left))} =="
  printf '%q ' "$@" >>"$commands"; echo >>"$commands"
  run "$@"
  last="$(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
  # for the estimate; a pretraining of seconds was complete already
  if [ "$kind" != pretraining ] || [ $((SECONDS - began)) -ge 5 ]; then printf -v "took_$kind" %s $((SECONDS - began)); fi
}
attempt() {  # a command; its exit code is in $code
  code=0
  "$@" & child=$!
  [ -z "$stopped" ] || kill -TERM "$child" 2>/dev/null || true
  wait "$child" || code=$?
  # a signal interrupts wait while the stage still saves: wait until it has ended
  while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done
  child=''
  [ -z "$stopped" ] || exit 75
}
run() { attempt "$@"; [ $code -eq 0 ] || exit $code; }
processes() {  # how the next stages are started
  launch=("$python")
  [ "$1" -eq 1 ] || launch+=(-m torch.distributed.run --standalone --nproc_per_node "$1" --)
}

common=(--data "$data" --noise "$noise" --preset "$preset")
[ -z "$range" ] || common+=("--range=$range")
pretrain() {  # run, arm, flags of its own
  local run=$1 arm=$2; shift 2
  GLIBC_TUNABLES=$keep stage "pretraining $arm, seed $seed" "${launch[@]}" "$here/pretrain.py" "${common[@]}" \
    --seed "$seed" --out "$out/pretrain/$run-seed$seed" "$@" ${flags[@]+"${flags[@]}"}
}
probe_flags=(${shots:+--shots "$shots"} ${img_size:+--img_size "$img_size" --resize "$img_size"})
probe() {  # arm, flags of its own
  local arm=$1; shift
  [ -z "$probes" ] || stage "probing $arm, seed $seed" "${launch[@]}" "$here/probe.py" "${common[@]}" \
    --run "$out/pretrain/$arm-seed$seed" --out "$out/probe/$arm-seed$seed.json" ${probe_flags[@]+"${probe_flags[@]}"} "$@"
}
probe_pixels() {  # name, flags of its own: what pretraining must beat
  local name=$1; shift
  stage "probing $name" "${launch[@]}" "$here/probe.py" "${common[@]}" --pixels --out "$out/probe/$name-seed0.json" \
    ${probe_flags[@]+"${probe_flags[@]}"} "$@"
}
denoised_run() {  # title, flags (--stop): one run is first phase of nc and nct and, to its end, the arm; trained once
  pretrain denoised "$@" --source denoised --denoised "$copy" --epochs "$epochs" ${first_flags[@]+"${first_flags[@]}"}
}
noisy_phase() {  # arm, flags: from the denoised run's networks, with optimiser and schedules anew
  local arm=$1; shift
  pretrain "$arm" "$arm" --source noisy --epochs $((epochs - switch)) --init "$out/pretrain/denoised-seed$seed/epoch$switch.pth" \
    ${noisy_flags[@]+"${noisy_flags[@]}"} "$@"
}
one_arm() {
  local arm=$1
  case $arm in
    random) pretrain random random --source noisy --epochs 0 ${first_flags[@]+"${first_flags[@]}"}; probe random ;;
    noisy|clean)
      pretrain "$arm" "$arm" --source "$arm" --epochs "$epochs" ${first_flags[@]+"${first_flags[@]}"}
      if [ "$arm" = noisy ]; then probe noisy; else probe clean --noise none; fi ;;
    denoised) denoised_run denoised; probe denoised "${through[@]}" ;;
    nc) noisy_phase nc; probe nc ;;
    nct)
      local pull=(${anchored[@]+"${anchored[@]}"})
      if [ "$preset" = imagenet1k ] && [ ${#pull[@]} -gt 0 ] && [[ ! "${nct_flags[*]-}" =~ --anchor_from ]]; then
        denoised_run "denoised for the anchor"  # the paper's anchor there is the finished denoised teacher
        pull+=(--anchor_from "$out/pretrain/denoised-seed$seed")
      fi
      noisy_phase nct ${pull[@]+"${pull[@]}"} ${nct_flags[@]+"${nct_flags[@]}"}
      probe nct ;;
  esac
}
all_stages() {
  if [ -z "$denoised" ] && uses "denoised|nc|nct"; then
    local few=$gpus  # of processes, each of which takes a part of the denoiser's batch
    while [ $((batch % few)) -ne 0 ]; do few=$((few - 1)); done
    processes $few
    stage "training the denoiser" "${launch[@]}" "$here/denoise.py" train "${common[@]}" ${stride:+--stride "$stride"} --out "$out/denoiser"
    processes "$gpus"
    stage "denoising the images" "${launch[@]}" "$here/denoise.py" apply "${common[@]}" --denoiser "$out/denoiser" --out "$copy"
  fi
  processes "$gpus"
  for seed in $seeds; do
    if uses "denoised|nc|nct" && [ "$switch" -gt 0 ] && [ "$switch" -lt "$epochs" ]; then  # so that nc and nct may come later
      denoised_run "denoised, first $switch of $epochs epochs" --stop "$switch"
    fi
    for arm in $arms; do one_arm "$arm"; done
  done
  if [ -n "$probes" ]; then
    probe_pixels pixels
    ! uses denoised || probe_pixels pixels_denoised --denoised "$copy"  # nc and nct alone need no denoised val/
  fi
  stage "report" "$python" "$here/probe.py" report "$out"
}

probes='' counting='' copy=${denoised:-$out/denoised}
if [ -d "$data/train" ] && [ -d "$data/val" ]; then
  attempt "$python" "$here/probe.py" check "${common[@]}" ${probe_flags[@]+"${probe_flags[@]}"} ${patch_size:+--patch_size "$patch_size"}
  case $code in
    0) probes=yes ;;
    3) ;;  # neither labels nor masks
    *) exit $code ;;
  esac
fi
[ -n "$probes" ] || [ -z "$img_size" ] || fail "--img_size $img_size: has no effect without labels or masks in $data"
[ -n "$probes" ] || [ -z "$shots" ] || fail "--shots $shots: has no effect without train/<class>/ and val/<class>/ in $data"
[ -n "$probes" ] || [ ! -d "$data/masks" ] || fail "--data $data: masks/ has no effect without train/, val/, masks/train/ and masks/val/"
[ -n "$probes" ] || echo "no train/<class>/ and val/<class>/, and no masks/, in $data: pretraining without probes"
through=(--denoised "$copy")  # what the probe of denoised images needs
[ -n "$denoised" ] || through+=(--denoiser "$out/denoiser")
anchored=(--denoised "$copy" --anchor "$anchor")
[[ ! $anchor =~ ^0*\.?0*$ ]] || anchored=()  # an anchor of weight 0 is none: nc
# bad flags and folders are told before anything is trained
tried=(${flags[@]+"${flags[@]}"})
if uses nct; then tried+=(--init none ${anchored[@]+"${anchored[@]}"} ${nct_flags[@]+"${nct_flags[@]}"}); fi
run "$python" "$here/pretrain.py" check "${common[@]}" --out none ${tried[@]+"${tried[@]}"}
if [ -n "$denoised" ]; then  # val's are for the probe of the arm denoised alone
  [ -z "$probes" ] || ! uses denoised || [ -d "$denoised/val" ] || fail "--denoised $denoised: has no val/, on which the arm denoised is probed"
  run "$python" "$here/pretrain.py" check "${common[@]}" --out none --source denoised --denoised "$denoised"
fi
mkdir -p "$out" 2>/dev/null && [ -w "$out" ] || fail "--out $out: cannot be written"
if command -v flock >/dev/null; then  # a process left by a killed run may still be writing: let it end
  exec 9>"$out/.lock"
  flock -n 9 || { echo "waiting for another run in $out"; run flock 9; }
fi
commands=$out/commands.log
# one line, which bash has read whole: the script may be edited while a chain runs
counting=yes; all_stages; counting=''; all_stages; exit
