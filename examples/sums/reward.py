"""The reward function of configs/smollm2_135m_sums.yaml, as an example of one's own."""

import re


def first_number(response: str, ground_truth: str) -> dict:
    """+1 if the first number of the response is the answer, -1 if not: what follows is the model's
    next sum, which nobody asked for."""
    numbers = re.findall(r"\d+", response)
    pred = numbers[0] if numbers else ""
    acc = float(pred == ground_truth)
    return {"score": 2 * acc - 1, "acc": acc, "pred": pred}
