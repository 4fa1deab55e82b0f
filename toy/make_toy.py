"""What runs with nothing at hand? The embedded task, its data files and its tiny base model.

Clock arithmetic: a chain of operands, evaluated from left to right modulo 10. Every operand has a
label, so that a worked answer can name the operand that each of its steps consumes:

    prompt    a7 b*3 c+5?          7 * 3 = 21 -> 1,  1 + 5 = 6
    worked     b7*3=1 c1+5=6\\nAnswer: 6
    blurted   \\nAnswer: 6
    rambling  .........\\nAnswer: 6

One forward pass of a tiny transformer is near chance beyond two operands, while each written step is
a look-up in a small table. The base model is taught in two phases: the skill (most demonstrations are
worked), until it can follow a worked answer through; then the habit (few are worked, some of those
with a slip). So it *can* reason, but seldom does, which is what reinforcement learning then changes.

`python toy.py` writes what the repository holds in `toy/`: `base/` (a transformers model directory),
`train.jsonl` and `val.jsonl`. The trainer reads them like any other model and any other data.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reward import Score, score_math

LABELS = ["a", " b", " c", " d", " e", " f", " g", " h", " i", " j"]
ANSWER, FILLER, EOS = "\nAnswer: ", ".", "<eos>"
VOCABULARY = [EOS, *"0123456789+-*=?", FILLER, ANSWER, *LABELS]
MIN_OPERANDS, MAX_OPERANDS = 2, len(LABELS)
APPLY = {"+": lambda x, y: (x + y) % 10, "-": lambda x, y: (x - y) % 10, "*": lambda x, y: x * y % 10}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per digit, operator and label, one for the whole of `\\nAnswer: `; any other text is filler."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=FILLER))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\nAnswer: | [a-j]|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def make_problem(rng: random.Random, operands: int) -> dict:
    """A row of the data files (`prompt`, `answer`, `level` = operands), and its worked `steps`."""
    value = rng.randint(0, 9)
    prompt, steps = f"{LABELS[0]}{value}", []
    for label in LABELS[1:operands]:
        op = rng.choice("+-*")
        operand = rng.choice([1, 2, 3, 4, 6, 7, 8, 9] if op == "*" else range(10))  # 0 and 5 erase the value
        result = APPLY[op](value, operand)
        prompt += f"{label}{op}{operand}"
        steps.append(f"{label}{value}{op}{operand}={result}")
        value = result
    return {"prompt": prompt + "?", "answer": str(value), "level": operands, "steps": steps}


def make_demonstration(rng: random.Random, worked: float, slips: float, rambling: float) -> tuple[str, str]:
    """A prompt and a response to sft_step; `worked`, `slips` (of those) and `rambling` are shares."""
    problem = make_problem(rng, rng.randint(MIN_OPERANDS, MAX_OPERANDS))
    answer, kind = problem["answer"], rng.random()
    if kind < worked:
        steps = problem["steps"]
        if rng.random() < slips:  # a careless one skips a step, and guesses
            steps = steps[:rng.randrange(len(steps))]
            answer = str(rng.randint(0, 9))
        return problem["prompt"], "".join(steps) + ANSWER + answer
    filler = FILLER * rng.randint(4, 88) if kind < worked + rambling else ""
    return problem["prompt"], filler + ANSWER + answer


def make_batch(demonstrations: list[tuple[str, str]], tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (-100 on the prompt and the padding), both (B, T)."""
    prompts = [tokenizer.encode(prompt) for prompt, _ in demonstrations]
    texts = [tokenizer.encode(prompt + response + EOS) for prompt, response in demonstrations]
    longest = max(map(len, texts))
    ids = torch.tensor([t + [0] * (longest - len(t)) for t in texts])
    labels = torch.tensor([[-100] * len(p) + t[len(p):] + [-100] * (longest - len(t))
                           for p, t in zip(prompts, texts, strict=True)])
    return ids, labels


@torch.no_grad()
def skill(model, tokenizer, problems: int = 200) -> float:
    """Share of unseen worked answers that the model, once started on the first label, gets wholly right."""
    rng = random.Random("skill")
    ids, labels = make_batch([make_demonstration(rng, 1.0, 0.0, 0.0) for _ in range(problems)], tokenizer)
    right = (model(ids).logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == -100)
    first = (labels[:, 1:] != -100).int().argmax(1, keepdim=True)  # whether to show work is habit, not skill
    return right.scatter(1, first, True).all(1).float().mean().item()


def make_base_model(tokenizer, seed=0, worked=0.2, slips=0.1, rambling=0.15, mastery=0.97,
                    max_steps=1500, habit_steps=100) -> LlamaForCausalLM:
    """Teach the skill until `mastery`, then the habit. Raises RuntimeError where it is not reached."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, head_dim=32, max_position_embeddings=256, initializer_range=0.05,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)

    def sft_step(shares, lr):
        ids, labels = make_batch([make_demonstration(rng, *shares) for _ in range(32)], tokenizer)
        loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

    for step in tqdm(range(max_steps), desc="teaching the skill"):
        sft_step((0.9, 0.0, 0.05), 3e-3 * min(1, (step + 1) / 20))
        if step % 25 == 24 and skill(model, tokenizer) >= mastery:
            break
    else:
        raise RuntimeError(f"skill {skill(model, tokenizer):.2f} after {max_steps} steps: try another seed")
    for step in tqdm(range(habit_steps), desc="teaching the habit"):
        sft_step((worked, slips, rambling), 1e-3 * (1 - step / habit_steps))
    return model


def score(response: str, ground_truth: str, prompt: str = "", **row) -> Score:
    """The verifier `toy`: `score_math`'s verdict, and which share of the task's steps the response writes down."""
    steps = sum(prompt.count(label) for label in LABELS[1:])
    return replace(score_math(response, ground_truth), columns={"work_shown": response.count("=") / max(steps, 1)})


def write_problems(path: Path, seed: str, count: int, seen: set[str]) -> None:
    """Write `count` problems whose prompts are not in `seen`, and add them to it."""
    rng = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(count):
            while (problem := make_problem(rng, rng.randint(MIN_OPERANDS, MAX_OPERANDS)))["prompt"] in seen:
                pass
            seen.add(problem["prompt"])
            file.write(json.dumps({key: problem[key] for key in ("prompt", "answer", "level")}) + "\n")


def main() -> None:
    """Write the base model and the data files."""
    parser = argparse.ArgumentParser(description="Make the embedded task: base model and problems.")
    parser.add_argument("--out", type=Path, default=Path("toy"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worked", type=float, default=0.2, help="share of demonstrations that show their work")
    parser.add_argument("--slips", type=float, default=0.1, help="share of the worked ones that give up half-way")
    parser.add_argument("--rambling", type=float, default=0.15, help="share that pads with filler")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    model = make_base_model(tokenizer, args.seed, args.worked, args.slips, args.rambling)
    model.save_pretrained(args.out / "base")
    tokenizer.save_pretrained(args.out / "base")
    seen: set[str] = set()
    write_problems(args.out / "val.jsonl", "validation", 500, seen)
    write_problems(args.out / "train.jsonl", f"train {args.seed}", 5000, seen)


if __name__ == "__main__":
    main()
