#!/usr/bin/env bash
# Every check that wants an NVIDIA GPU, in one go of a few minutes; results go to the folder $1.
#   bash bench/gpu.sh results
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
scratch=$(mktemp -d)
export HF_HUB_OFFLINE=1
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee "$out/machine.txt"
python3 -c 'import torch, transformers, accelerate
for package in (torch, transformers, accelerate):
    print(package.__name__, package.__version__, end=" ")
print()' | tee -a "$out/machine.txt"

check() {  # a name, then a command: its output to a file, and one line of result
  local name=$1 start=$SECONDS
  shift
  timeout "${limit:-300}" "$@" > "$out/$name.log" 2>&1
  echo "$name: exit $?, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}
train() {  # a name, launcher options, --, overrides
  local name=$1 options=()
  shift
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  check "$name" accelerate launch "${options[@]}" train_dapo.py --config config.yaml "$@"
}
for bench in logprob_memory update_gpu update_vs_bare rollout_vs_generate scaling; do
  check "$bench" python3 "bench/$bench.py"
done
small="val.max_prompts=50 actor.max_tokens_per_micro_batch=8192"
check memory python3 bench/memory.py
check estimate_0.5B python3 bench/estimate.py --shape 0.5B
check estimate_1.5B python3 bench/estimate.py --shape 1.5B  # LoRA and full fine-tuning among its cases
limit=1500 check mismatch python3 bench/mismatch.py --model 0.5B 1.5B --tokens 512
half="model.dtype=bfloat16 mixed_precision=bf16"
limit=600 check vllm_asked python3 bench/vllm_speed.py asked --model 0.5B --tokens 1024 $half
limit=600 check vllm_throughput python3 bench/vllm_speed.py throughput --model 0.5B --tokens 1024 $half
limit=600 check vllm_step python3 bench/vllm_speed.py step --model 1.5B --rounds 3
if [ -n "${TRL_PYTHON:-}" ]; then  # an environment that has TRL and vLLM: see compare_trl.py
  for shape in 0.5B 1.5B; do
    limit=1200 check "compare_trl_$shape" python3 bench/compare_trl.py --trl-python "$TRL_PYTHON" --shape $shape \
      --micro-batch 8 --repeats 1 --steps 2
  done
fi
train fp16 --num_processes 1 -- run_dir="$scratch/fp16" total_training_steps=10 mixed_precision=fp16 $small
train plain --num_processes 1 -- run_dir="$scratch/plain" total_training_steps=10 save_every=5 $small
train fsdp2 --config_file configs/accelerate_fsdp2.yaml --num_processes 1 -- run_dir="$scratch/fsdp2" total_training_steps=5 save_every=5 $small
train fsdp2_resumed --config_file configs/accelerate_fsdp2.yaml --num_processes 1 -- run_dir="$scratch/fsdp2" total_training_steps=10 save_every=5 $small
train fsdp2_bf16 --config_file configs/accelerate_fsdp2.yaml --num_processes 1 -- run_dir="$scratch/bf16" total_training_steps=10 \
  mixed_precision=bf16 model.gradient_checkpointing=true actor.use_kl_loss=true $small
sed 's/fsdp_offload_params: false/fsdp_offload_params: true/' configs/accelerate_fsdp2.yaml > "$scratch/offload.yaml"
train fsdp2_offload --config_file "$scratch/offload.yaml" --num_processes 1 -- run_dir="$scratch/offload" total_training_steps=3 $small
train fsdp2_fp16 --config_file configs/accelerate_fsdp2.yaml --num_processes 1 -- run_dir="$scratch/fsdp2_fp16" total_training_steps=5 \
  mixed_precision=fp16 $small
for run in plain fsdp2 bf16 offload fp16 fsdp2_fp16; do
  cp "$scratch/$run/metrics.jsonl" "$out/$run.jsonl"
done
python3 - "$out" <<'PY' | tee -a "$out/summary.txt"
import json, pathlib, sys
runs = {}
for name in ("plain", "fsdp2", "bf16", "offload", "fp16", "fsdp2_fp16"):
    file = pathlib.Path(sys.argv[1]) / f"{name}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else [{}]
    print(name, *(f"{row.get('actor/loss', 0):.6f}/{row.get('actor/grad_norm', 0):.5f}/{row.get('actor/mismatch_abs', 0):.1e}" for row in rows[1:4]),
          "accuracy", rows[0].get("val/val/avg@4"), "->", rows[-1].get("val/val/avg@4"), "seconds a step", rows[-1].get("time/step"))
    runs[name] = [row.get("actor/loss", 0) for row in rows[1:4]]
good = all(abs(a - b) < 1e-5 for name in ("fsdp2", "offload") for a, b in zip(runs["plain"], runs[name], strict=True))
print("goal: losses of FSDP2 within 1e-5 of one process's:", "reached" if good else "missed")
sys.exit(not good)
PY
good=${PIPESTATUS[0]}
rm -rf "$scratch"
exit "$good"
