#!/usr/bin/env bash
# Every check that wants an NVIDIA GPU; those that tell most come first.
#   bash bench/gpu.sh results [losses] [update] [vllm] [trl] [mismatch] [memory] [other]
# Runs the parts that are named, all of them if none is, each for PART_SECONDS at most. The folder
# gets a log of each part and summary.txt, written as they come. Exits 1 if a check fails, misses its
# goal or has no time left, or if there is no GPU; names what it skips because it is not installed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?folder for the results}" && cd "$1" && pwd)
shift
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
failed=0
say() { echo "$*" | tee -a "$out/summary.txt"; }

needs_vllm() {
  python3 -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("vllm"))' ||
    { say "skipped $part$*: vLLM is not installed (requirements-vllm.txt)"; return 1; }
}
check() {  # a name, then a command: its output to the log of the part, and one line of result
  local name=$1 start=$SECONDS left=$((deadline - SECONDS)) code
  shift
  if [ "$left" -le 0 ]; then
    failed=1
    say "$name: not run, part $part has used its time"
    return
  fi
  echo "==== $name: $*" >> "$out/$part.log"
  timeout -k 10 $((left < ${limit:-300} ? left : ${limit:-300})) "$@" >> "$out/$part.log" 2>&1
  code=$?
  [ "$code" -eq 0 ] || failed=1
  say "$name: exit $code, $((SECONDS - start)) s"
}
train() {  # a name, launcher options, --, overrides
  local name=$1 options=()
  shift
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  check "$name" accelerate launch "${options[@]}" --num_processes 1 train_dapo.py \
    --config config.yaml val.max_prompts=50 save_every=5 "$@"
}

losses() {
  local fsdp2=(--config_file configs/accelerate_fsdp2.yaml) offload="$scratch/offload.yaml"
  sed 's/offload_params: false/offload_params: true/' configs/accelerate_fsdp2.yaml > "$offload"
  train plain -- run_dir="$scratch/plain" total_training_steps=10
  train fsdp2 "${fsdp2[@]}" -- run_dir="$scratch/fsdp2" total_training_steps=5
  train offload --config_file "$offload" -- run_dir="$scratch/offload" total_training_steps=3
  train fsdp2_bf16 "${fsdp2[@]}" -- run_dir="$scratch/fsdp2_bf16" total_training_steps=10 \
    mixed_precision=bf16 model.gradient_checkpointing=true actor.use_kl_loss=true
  train fp16 -- run_dir="$scratch/fp16" total_training_steps=10 mixed_precision=fp16
  train fsdp2_fp16 "${fsdp2[@]}" -- run_dir="$scratch/fsdp2_fp16" total_training_steps=5 \
    mixed_precision=fp16
  train fsdp2_resumed "${fsdp2[@]}" -- run_dir="$scratch/fsdp2" total_training_steps=10
  python3 - "$scratch" plain fsdp2 offload fsdp2_bf16 fp16 fsdp2_fp16 <<'PY' | tee -a "$out/summary.txt"
import json, math, pathlib, sys
losses, good = {}, True
for name in sys.argv[2:]:
    file = pathlib.Path(sys.argv[1], name, "metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    steps = [row for row in rows if math.isfinite(row.get("actor/loss") or math.nan)][:3]
    losses[name] = [row["actor/loss"] for row in steps]
    if len(steps) < 3:
        good = False
        print(f"{name}: {len(steps)} finite losses, 3 are needed")
        continue
    print(name, *(f"{row['actor/loss']:.6f}/{row.get('actor/grad_norm') or math.nan:.5f}/"
                  f"{row.get('actor/mismatch_abs') or 0:.1e}" for row in steps),
          "accuracy", rows[0].get("val/val/avg@4"), "->", rows[-1].get("val/val/avg@4"),
          "seconds a step", rows[-1].get("time/step"))
good = good and all(abs(a - b) < 1e-5 for name in ("fsdp2", "offload")
                    for a, b in zip(losses["plain"], losses[name], strict=True))
print("goal: three losses of every run, those of FSDP2 within 1e-5 of one process's:",
      "reached" if good else "missed")
sys.exit(not good)
PY
  [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
}
update() { limit=540 check update_gpu python3 bench/update_gpu.py; }
vllm() {
  needs_vllm || return 0
  local half="model.dtype=bfloat16 mixed_precision=bf16"
  check vllm_step python3 bench/vllm_speed.py step --model 1.5B --rounds 3
  check vllm_throughput python3 bench/vllm_speed.py throughput --model 0.5B --tokens 1024 $half
  check vllm_asked python3 bench/vllm_speed.py asked --model 0.5B --tokens 1024 $half
}
trl() {
  local shape
  needs_vllm || return 0
  if [ -z "${TRL_PYTHON:-}" ]; then
    say "skipped $part: TRL_PYTHON names no Python that has TRL and vLLM (see compare_trl.py)"
    return
  fi
  for shape in 1.5B 0.5B; do
    limit=540 check "compare_trl_$shape" python3 bench/compare_trl.py --trl-python "$TRL_PYTHON" \
      --shape $shape --micro-batch 8 --repeats 1 --steps 2
  done
}
mismatch() {
  local shape
  needs_vllm " with vLLM"  # the other rows are measured
  for shape in 0.5B 1.5B; do
    check "mismatch_$shape" python3 bench/mismatch.py --model $shape --tokens 512
  done
}
memory() {
  check memory python3 bench/memory.py
  check estimate_0.5B python3 bench/estimate.py --shape 0.5B
  check estimate_1.5B python3 bench/estimate.py --shape 1.5B  # with LoRA and without
  check logprob_memory python3 bench/logprob_memory.py
}
other() {
  local bench
  for bench in update_vs_bare rollout_vs_generate scaling; do
    check "$bench" python3 "bench/$bench.py"
  done
}

machine=$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>&1) &&
  versions=$(python3 -c 'import torch, transformers, accelerate
torch.cuda.init()
for package in (torch, transformers, accelerate):
    print(package.__name__, package.__version__, end=" ")' 2>&1)
found=$?
say "$machine"
say "$(tail -n 1 <<< "${versions:-}")"
if [ "$found" -ne 0 ]; then
  say "skipped everything: nvidia-smi or torch finds no NVIDIA GPU"
  exit 1
fi
[ $# -gt 0 ] || set -- losses update vllm trl mismatch memory other
for part in "$@"; do
  deadline=$((SECONDS + ${PART_SECONDS:-540}))
  "$part" || failed=1
done
exit "$failed"
