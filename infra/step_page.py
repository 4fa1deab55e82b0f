"""The page of a step: its saved groups, response by response and token by token, and the curves of
the run, as one HTML file that opens anywhere (step_page.html is its template).

What a policy writes is always escaped: texts are data in JSON without `<`, the script puts them
into text nodes only, with escapes for what is invisible, and the page's policy allows no other
script and no network.
"""

import base64
import hashlib
import html
import json
import re
from array import array
from collections.abc import Sequence
from pathlib import Path

from infra.config import escape_control
from infra.data import read_jsonl
from infra.provenance import describe_code

TEMPLATE = Path(__file__).with_suffix(".html")


def write_step_page(run_dir: str | Path, step: int, metrics: dict, curves: bytes,
                    out: str | Path, neighbours: Sequence[int] = ()) -> None:
    """Write the page. `metrics`: the step's row of metrics.jsonl; `curves`: a picture, PNG;
    `neighbours`: steps whose pages lie beside it.

    Raises ValueError if the run has no rollouts of the step, or they are not readable.
    """
    groups, template = read_groups(Path(run_dir), step), TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    parts = {"title": html.escape(f"{Path(run_dir).resolve().name}, step {step}"),
             "counts": describe_counts(metrics, len(groups)),
             "code": html.escape(escape_control(describe_code(run_dir, step))),
             "neighbours": "".join(f'<a href="step_{other:05d}.html">step {other}</a> · '
                                   for other in neighbours),
             "figures": "".join(f"<tr><td>{html.escape(name)}<td>{value:.4g}"
                                for name, value in metrics.items()),
             "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
             "curves": base64.b64encode(curves).decode(),
             "data": json.dumps(groups, ensure_ascii=False, separators=(",", ":")).replace(
                 "<", "\\u003c")}
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    Path(out).write_text(page, "utf-8", "backslashreplace")  # half a character: as JSON escapes it


def read_groups(run_dir: Path, step: int) -> list[dict]:
    """The saved groups of a step as the page shows them, those that were trained first."""
    files = [run_dir / f"rollouts/{kind}_{step:05d}.jsonl" for kind in ("step", "dropped")]
    if not files[0].exists():
        steps = sorted(int(path.stem[5:]) for path in files[0].parent.glob("step_*.jsonl"))
        raise ValueError(f"{files[0]}: no such file: " + (
            f"the saved steps are {', '.join(map(str, steps))}" if steps else
            "this run has saved no responses (save_rollouts=0)"))
    groups = {}
    for file in filter(Path.exists, files):
        for location, record in read_jsonl(str(file)):
            try:
                trained = record["advantage"] is not None
                group = groups.setdefault(record["position"], {
                    "outcome": "trained" if trained else record.get("dropped", "step skipped"),
                    "prompt": record["prompt"], "answer": record["answer"], "responses": []})
                group["responses"].append(describe_response(record))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{location}: not a response as a run saves it ({error!r}): "
                                 "delete this line") from None
    return list(groups.values())


def describe_response(record: dict) -> dict:
    """A response as the page shows it, from its record in the rollout file."""
    advantage = record["advantage"]
    facts = {"score": f"{record['score']:.3g}",
             "penalty": f"{record['reward'] - record['score']:.3g}"}
    if record["final_reward"] != record["reward"]:
        facts["KL penalty"] = f"{record['final_reward'] - record['reward']:.3g}"
    facts["reward"] = f"{record['final_reward']:.3g}"
    if isinstance(advantage, list):
        facts["advantage"] = f"{min(advantage):.3g} to {max(advantage):.3g}"
    elif advantage is not None:
        facts["advantage"] = f"{advantage:.3g}"
    facts |= {name: f"{value:.3g}" if isinstance(value, float) else str(value)
              for name, value in record.items() if name.startswith("reward/")}
    facts |= {"parsed": record["pred"] or "none", "tokens": str(record["tokens"]),
              "finish": record["finish_reason"]}
    if record["status"] != "ok":
        facts["reward function"] = record["status"]
    response = {"acc": record["acc"], "facts": facts}
    if not (stats := record.get("token_stats")):
        return response | {"text": record["response"]}
    facts["trained in update"] = str(stats["update"])
    values = stats["values"] | {
        "advantage": advantage if isinstance(advantage, list) else [advantage]}
    return response | {"texts": stats["texts"], "flags": stats["flags"], "values": {
        name: quantise(numbers) for name, numbers in values.items()}}


def describe_counts(metrics: dict, shown: int) -> str:
    """How many groups the step generated, what became of them, how many of them are `shown`."""
    if "groups/trained" not in metrics:
        return ""
    generated, wasted = metrics["responses/generated"], metrics["responses/wasted"]
    parts = [f"{generated} responses generated, {generated - wasted} trained",
             f"{shown} groups saved (save_rollouts)"]
    parts += [f"{metrics[f'groups/{name}']:.0%} of groups {name.replace('_', ' ')}"
              for name in ("all_correct", "all_wrong") if f"groups/{name}" in metrics]
    return " · ".join(parts)


def quantise(values: Sequence[float]) -> list:
    """[low, high, base64 of 16 bits for each value]: values of low + (high - low) * bits / 65535,
    a tenth of the size of digits."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = 65535 / (high - low) if high > low else 0.0
    bits = array("H", [round((value - low) * scale) for value in values])
    return [low, high, base64.b64encode(bits.tobytes()).decode()]
