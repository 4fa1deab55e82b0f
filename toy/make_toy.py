"""Makes the embedded task: its data files and its tiny base model.

Clock arithmetic: a chain of operands, evaluated from left to right modulo 10. Every operand has a
label, so that a worked answer can name the operand that each of its steps uses:

    prompt    a7 b*3 c+5?          7 * 3 = 21 -> 1,  1 + 5 = 6
    worked     b7*3=1 c1+5=6\\nAnswer: 6
    bare      \\nAnswer: 6
    padded    .........\\nAnswer: 6

One forward pass of a tiny transformer is near chance beyond two operands; each written step is a
look-up in a small table. The base model is trained on demonstrations in two phases: reasoning (most
are worked), until it follows a worked answer through; then style (few are worked, some of those
with errors). So it is able to reason, but seldom does, which reinforcement learning then changes.

`python toy/make_toy.py` writes `base/` (a transformers model directory), `train.jsonl` and
`val.jsonl`, which are read like any other model and any other data. `hard/base` is that of
configs/ladder.yaml, which has the command.
"""

import argparse
import json
import operator
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LABELS = ["a", " b", " c", " d", " e", " f", " g", " h", " i", " j"]
ANSWER, FILLER, EOS = "\nAnswer: ", ".", "<eos>"
VOCABULARY = [EOS, *"0123456789+-*=?", FILLER, ANSWER, *LABELS]
APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}
RATES = (0.2, 0.1, 0.15)  # of the base model's style: see `make_demonstration`
LONGEST_PADDING, PAUSE_RATE = 88, 0.0


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each digit, operator and label, and for `\\nAnswer: `; other text is filler."""
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=FILLER))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\nAnswer: | [a-j]|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def make_problem(rng: random.Random) -> tuple[dict, list[str]]:
    """A row of the data files (`level` is the number of operands), and its worked steps."""
    operands = rng.randint(2, len(LABELS))
    value = rng.randint(0, 9)
    prompt, steps = f"{LABELS[0]}{value}", []
    for label in LABELS[1:operands]:
        op = rng.choice("+-*")
        # times 0 or 5 would erase the value
        operand = rng.choice([1, 2, 3, 4, 6, 7, 8, 9] if op == "*" else range(10))
        result = APPLY[op](value, operand) % 10
        prompt += f"{label}{op}{operand}"
        steps.append(f"{label}{value}{op}{operand}={result}")
        value = result
    return {"prompt": prompt + "?", "answer": str(value), "level": operands}, steps


def make_demonstration(rng: random.Random, worked_rate: float, error_rate: float,
                       filler_rate: float, longest_padding: int = LONGEST_PADDING,
                       pause_rate: float = PAUSE_RATE) -> tuple[str, str]:
    """A prompt and a response to imitate.

    The rates are shares: of worked responses, of errors among those, of padded responses (at most
    `longest_padding` tokens of filler), and of worked steps that a filler follows, which makes no
    difference to the answer: a free choice.
    """
    problem, steps = make_problem(rng)
    answer, kind, thoughts = problem["answer"], rng.random(), ""
    if kind < worked_rate:
        if rng.random() < error_rate:  # leaves steps out, and guesses
            steps = steps[:rng.randrange(len(steps))]
            answer = str(rng.randint(0, 9))
        if pause_rate:
            steps = [step + FILLER * (rng.random() < pause_rate) for step in steps]
        thoughts = "".join(steps)
    elif kind < worked_rate + filler_rate:
        thoughts = FILLER * rng.randint(4, longest_padding)
    return problem["prompt"], thoughts + ANSWER + answer


def make_sft_batch(demonstrations: list[tuple[str, str]],
               tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (-100 on the prompt and the padding), both (B, T)."""
    ids, labels = [], []
    for prompt, response in demonstrations:
        ids.append(torch.tensor(tokenizer.encode(prompt + response + EOS)))
        labels.append(ids[-1].clone())
        labels[-1][:len(tokenizer.encode(prompt))] = -100
    return pad_sequence(ids, batch_first=True), pad_sequence(labels, True, padding_value=-100)


@torch.no_grad()
def reasoning_accuracy(model, tokenizer, problems: int = 200) -> float:
    """The share of unseen worked answers that the model, given the first label, gets wholly right.

    The first label is given because whether to show the work is style, not reasoning.
    """
    rng = random.Random("skill")
    demonstrations = [make_demonstration(rng, 1.0, 0.0, 0.0) for _ in range(problems)]
    ids, labels = make_sft_batch(demonstrations, tokenizer)
    right = (model(ids).logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == -100)
    first = (labels[:, 1:] != -100).int().argmax(1, keepdim=True)
    return right.scatter(1, first, True).all(1).float().mean().item()


def make_base_model(tokenizer, seed: int, rates: Sequence[float], longest_padding: int,
                    pause_rate: float) -> LlamaForCausalLM:
    """A model trained on reasoning until it is good at it, then on style with the given rates.

    Raises RuntimeError if it does not become good.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, head_dim=32, max_position_embeddings=256, initializer_range=0.05,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)

    def sft_step(rates, lr):
        demonstrations = [make_demonstration(rng, *rates, longest_padding, pause_rate)
                          for _ in range(32)]
        ids, labels = make_sft_batch(demonstrations, tokenizer)
        model(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

    for step in tqdm(range(1500), desc="training on reasoning"):
        sft_step((0.9, 0.0, 0.05), 3e-3 * min(1, (step + 1) / 20))
        if step % 25 == 24 and reasoning_accuracy(model, tokenizer) >= 0.97:
            break
    else:
        raise RuntimeError("too many errors of reasoning after 1500 steps: try another --seed")
    for step in tqdm(range(100), desc="training on style"):
        sft_step(rates, 1e-3 * (1 - step / 100))
    return model


def write_problems(path: Path, seed: str, count: int, seen: set[str]) -> None:
    """Write `count` problems whose prompts are not in `seen`, and add them to it."""
    rng = random.Random(seed)
    with open(path, "w") as file:
        while count:
            problem, _ = make_problem(rng)
            if problem["prompt"] not in seen:
                seen.add(problem["prompt"])
                file.write(json.dumps(problem) + "\n")
                count -= 1


def main() -> None:
    """Write the base model and the data files."""
    parser = argparse.ArgumentParser(description="Make the embedded task: base model and problems.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", type=float, nargs=3, default=RATES, help="shares of responses: "
                        "worked; with errors, of those; padded", metavar="RATE")
    parser.add_argument("--longest-padding", type=int, default=LONGEST_PADDING, help="most tokens "
                        "of filler in a padded response")
    parser.add_argument("--pauses", type=float, default=PAUSE_RATE,
                        help="share of worked steps that a filler follows")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    model = make_base_model(tokenizer, args.seed, args.rates, args.longest_padding, args.pauses)
    model.save_pretrained(args.out / "base")
    tokenizer.save_pretrained(args.out / "base")
    seen: set[str] = set()
    write_problems(args.out / "val.jsonl", "validation", 500, seen)
    write_problems(args.out / "train.jsonl", f"train {args.seed}", 5000, seen)


if __name__ == "__main__":
    main()
