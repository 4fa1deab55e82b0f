"""How far apart sampler and trainer are, by the precision of the passes and of the output head.

    python bench/mismatch.py [--model toy/base sums 0.5B 1.5B] [--backend transformers vllm]

A model is a directory, `sums` for the pretrained one of configs/smollm2_135m_sums.yaml and its
prompts (`examples/sums/prepare.py --model` makes both), or a shape: a random model of Qwen2.5's
(bench/vllm_gpu.py), whose last norm is scaled so that its logits are as large as trained ones. No
line break ends a response. Prints a Markdown table. Each row is
measured in a process of its own. Exits with 1 if a float32 head does not lower mismatch_kl.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from harness import ROOT, logprobs_of, make_state
from vllm_gpu import SHAPES, make_model

HALF = {"bf16": "mixed_precision=bf16", "fp16": "mixed_precision=fp16"}
SETTINGS = {f"{name}{', float32 head' * head}": [key, f"rollout.fp32_head={str(head).lower()}"]
            for name, key in HALF.items() for head in (False, True)} | {"float32": []}
LOGIT_SCALE = 4
SUMS = "configs/smollm2_135m_sums.yaml"


def make_random_model(shape: str, folder: str) -> None:
    """Its weights are bfloat16 numbers, as those of published models."""
    from transformers import AutoModelForCausalLM
    make_model(shape, Path(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.model.norm.weight.data.fill_(LOGIT_SCALE)
    model.save_pretrained(folder)


def measure(overrides: list[str], prompts: int, n: int) -> dict[str, float]:
    """The metrics `actor/mismatch_*` of responses that the engine has just sampled."""
    import torch

    from data_types import Sample, SamplingParams
    from losses import kl_penalty
    config = SUMS if "model.path=examples/sums/base" in overrides else "config.yaml"
    state, data = make_state(*overrides, config=config)
    ids = [prompt.token_ids for prompt in data.train[:prompts]]
    params = SamplingParams(n, state.config.data.max_response_length)
    groups = state.engine.generate(ids, [(0, i) for i in range(len(ids))], params)
    responses = [(prompt, response) for prompt, group in zip(ids, groups, strict=True)
                 for response in group]
    samples = [Sample(prompt, response.token_ids, 0.0) for prompt, response in responses]
    ours = torch.cat(logprobs_of(state, samples))
    theirs = torch.cat([torch.from_numpy(response.logprobs) for _, response in responses])
    state.engine.close()
    difference = (ours - theirs).abs()
    return {"mismatch_abs": difference.mean().item(), "largest": difference.max().item(),
            "mismatch_kl": kl_penalty(theirs, ours, "k3").mean().item(), "tokens": len(ours)}


def main() -> None:
    """Measure each model with each backend and setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["toy/base"])
    parser.add_argument("--backend", nargs="+", choices=["transformers", "vllm"],
                        default=["transformers"] + ["vllm"] * (find_spec("vllm") is not None))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--n", type=int, default=8, help="responses a prompt")
    parser.add_argument("--tokens", type=int, default=96, help="of the longest response")
    parser.add_argument("--one", nargs="+", help="measure one row: the overrides; prints JSON")
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(measure(args.one, args.prompts, args.n)), flush=True)
        return
    print("| model | responses by | passes | mismatch_abs | mismatch_kl | largest | tokens |\n"
          "|---|---|---|---|---|---|---|")
    kls = {}
    for model in args.model:
        with tempfile.TemporaryDirectory() as folder:
            if model in SHAPES:
                make_random_model(model, folder)
            path = folder if model in SHAPES else "examples/sums/base" if model == "sums" else model
            for backend, (name, setting) in product(args.backend, SETTINGS.items()):
                overrides = [f"model.path={path}", f"rollout.backend={backend}", *setting,
                             f"data.max_response_length={args.tokens}", "val.file=",
                             "overlong_buffer.enable=false", "rollout.stop_tokens="]
                command = [sys.executable, __file__, "--prompts", str(args.prompts), "--n",
                           str(args.n), "--one", *overrides]
                cells, kls[model, backend, name] = measure_apart(command)
                print(f"| {model} | {backend} | {name} | {cells} |", flush=True)
    worse = [key for key, kl in kls.items() if key[2] in HALF
             and not kls[*key[:2], f"{key[2]}, float32 head"] < kl]
    print(f"\nmismatch_kl is not lower with a float32 head in {len(worse)} cases (goal 0) "
          + ", ".join(map(str, worse)))
    sys.exit(bool(worse))


def measure_apart(command: list[str]) -> tuple[str, float]:
    """What a process that measures one row found, as cells of the table, and its mismatch_kl."""
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return f"failed: {(run.stdout + run.stderr).splitlines()[-1][:300]} | | |", math.nan
    found = json.loads(lines[-1].removeprefix("RESULT "))
    return (f"{found['mismatch_abs']:.1e} | {found['mismatch_kl']:.1e} | "
            f"{found['largest']:.1e} | {found['tokens']}"), found["mismatch_kl"]


if __name__ == "__main__":
    main()
