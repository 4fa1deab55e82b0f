"""LoRA (rank 8, all linear layers) beside full fine-tuning on the embedded task; checkpoint sizes.

    python bench/lora.py [--seeds 0 1 2] [key.sub=value ...]        6 minutes on 2 cores

The learning rate of LoRA was chosen on seeds 10 and 11. The embedded model is so small that rank 8
is a large part of it; sizes are therefore measured on a random model of width 512 too. Exits with 1
if a goal is missed.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from embedded import read_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
LORA = ["model.lora_rank=8", "actor.lr=5e-4"]
GOALS = {"accuracy": 0.03, "size": 0.05}
LARGER = {"vocab_size": 28, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
          "num_attention_heads": 8, "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": None}
ONE_STEP = ["total_training_steps=1", "data.train_batch_size=2", "actor.ppo_mini_batch_size=32",
            "filter_groups.enable=false", "val.file="]  # nothing a random model writes is right


def run(run_dir: Path, *overrides: str) -> Path:
    """Train in a process of its own; returns `run_dir`."""
    subprocess.run([sys.executable, "train_dapo.py", "--config", "config.yaml",
                    f"run_dir={run_dir}", *overrides], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return run_dir


def checkpoint_size(run_dir: Path) -> int:
    """Bytes of the newest checkpoint."""
    newest = max((run_dir / "checkpoints").glob("step_*"))
    return sum(file.stat().st_size for file in newest.iterdir())


def main() -> None:
    """Run, print both tables and whether the goals are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args, missed, sizes = parser.parse_intermixed_args(), [], {}
    print("| seed | avg@4, all weights trained | LoRA |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for seed in args.seeds:
            runs = [run(folder / f"{name}{seed}", f"seed={seed}", *extra, *args.overrides)
                    for name, extra in (("full", []), ("lora", LORA))]
            full, lora = (read_run(run_dir)["after"] for run_dir in runs)
            print(f"| {seed} | {full:.3f} | {lora:.3f} |", flush=True)
            missed += [f"seed {seed}: accuracy"] * (lora < full - GOALS["accuracy"])
            sizes["the embedded one"] = [checkpoint_size(run_dir) for run_dir in runs]
        base = folder / "base"
        larger = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LARGER))
        larger.save_pretrained(base)
        AutoTokenizer.from_pretrained(ROOT / "toy/base").save_pretrained(base)
        sizes["width 512"] = [
            checkpoint_size(run(folder / f"larger{len(extra)}", f"model.path={base}", *ONE_STEP,
                                *extra)) for extra in ([], LORA)]
    print("\n| model | MB of a checkpoint | with LoRA | share |\n|---|---|---|---|")
    for name, (full, lora) in sizes.items():
        print(f"| {name} | {full / 1e6:.2f} | {lora / 1e6:.2f} | {lora / full:.3f} |")
    missed += ["size"] * (lora > GOALS["size"] * full)
    print(f"\ngoals: LoRA's accuracy at most {GOALS['accuracy']} lower, checkpoints of the larger "
          f"model at most {GOALS['size']} of full ones"
          + "".join(f"; missed: {name}" for name in missed))
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
