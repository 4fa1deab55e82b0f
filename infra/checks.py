"""Checks before the first step: do model, tokenizer, data and reward function fit together?

Each finding is one warning that names the key to set. Without it, a run would train for hours on
responses that never end, or are never right.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from types import SimpleNamespace

import psutil
import torch
from accelerate import Accelerator

from data_types import Data, Prompt, Task
from infra.config import split_list, value_of_set
from infra.data import find_column
from infra.distributed import map_over_ranks, warn
from infra.reward_function import BUILT_IN
from infra.reward_pool import IN_TRAINER, Scorer
from infra.tokens import stop_token_ids
from reward import last_boxed

FORMS = ("Answer: {}", r"\boxed{{{}}}", "<answer>{}</answer>")  # that reward functions read


def check_start(config: SimpleNamespace, accelerator: Accelerator, tokenizer,
                policy: torch.nn.Module, scorer: Scorer, data: Data) -> None:
    """Warn of all that the checks below find. Raises ValueError for what cannot work."""
    prompts, stop_ids = [*data.train, *chain(*data.val.values())], stop_token_ids(policy, tokenizer)
    check_token_ids(tokenizer, policy, prompts)
    if len(stop_ids) > 1:
        accelerator.print(f"a response ends with {token_names(tokenizer, stop_ids)}")
    for warning in chain(check_launch(accelerator.num_processes), check_sampling(config),
                         check_epochs(config.data, data),
                         check_first_prompt(config.data, tokenizer, prompts[0]),
                         check_stop_tokens(config, tokenizer, stop_ids),
                         check_references(config, accelerator, scorer, prompts)):
        warn(accelerator, warning)


def token_names(tokenizer, ids: Sequence[int]) -> str:
    """`'<|im_end|>' or '<|endoftext|>'`."""
    return " or ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))


def check_token_ids(tokenizer, policy: torch.nn.Module, prompts: Sequence[Prompt]) -> None:
    """Raise ValueError if a prompt has a token that the model has no embedding of."""
    count = policy.get_input_embeddings().num_embeddings
    for ids in {id(prompt.token_ids): prompt.token_ids for prompt in prompts}.values():
        if ids and (largest := max(ids)) >= count:
            raise ValueError(
                f"model.path: the tokenizer's token {tokenizer.convert_ids_to_tokens(largest)!r} "
                f"has the id {largest}, but the model has {count} embeddings: the two do not "
                "belong together, or tokens were added to one of them only")


def check_launch(num_processes: int) -> Iterator[str]:
    """Whether the launcher was asked for several processes and has started one."""
    with suppress(psutil.Error):  # another user's, or gone
        command = " ".join(psutil.Process().parent().cmdline())
        asked = re.search(r"--num[-_]processes[ =](\d+)", command)
        if asked and num_processes == 1 < int(asked[1]):
            yield (f"the launcher was asked for {asked[1]} processes and started one: without GPUs "
                   "it wants --multi_gpu too, or --config_file configs/accelerate_ddp.yaml")


def check_epochs(settings: SimpleNamespace, data: Data) -> Iterator[str]:
    """Whether a step draws prompts more than once."""
    if 0 < len(data.train) < settings.train_batch_size:
        yield (f"data.train_file has {len(data.train)} prompts, fewer than data.train_batch_size="
               f"{settings.train_batch_size}: a step trains on the same prompt several times")


def check_sampling(config: SimpleNamespace) -> Iterator[str]:
    """Settings that have ruined runs, and may be intended."""
    metric = config.filter_groups.metric
    if config.rollout.top_p < 1:
        yield (f"rollout.top_p={config.rollout.top_p}: the ratio compares with a distribution that "
               "was not sampled from; 1.0 is sound")
    val = config.val
    if any(value_of_set(val.temperature, i) == 0 and value_of_set(val.n, i) > 1
           for i in range(len(split_list(val.file)))):
        yield (f"val.temperature=0 with val.n={val.n}: all responses to a prompt are the same; "
               "val.n=1 says as much")
    if config.filter_groups.enable and metric.startswith("seq_") and config.overlong_buffer.enable:
        yield (f"filter_groups.metric={metric} includes the overlong penalty: groups that are all "
               "wrong train on their lengths; acc is sound")


def check_stop_tokens(config: SimpleNamespace, tokenizer, stop_ids: Sequence[int]) -> Iterator[str]:
    """Whether some token ends a response, and is the one that ends turns in the chat template."""
    if not stop_ids:
        yield ("model and tokenizer name no EOS that the model can write: every response is cut at "
               f"data.max_response_length={config.data.max_response_length}; set "
               "rollout.stop_tokens")
    if not (config.data.apply_chat_template and tokenizer.chat_template):
        return
    answer = "the answer"
    chat = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        options = json.loads(config.data.chat_template_kwargs or "{}")
        text = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    except Exception:  # a template may refuse such a chat, with an error of any kind
        return
    after = tokenizer.encode(text.rpartition(answer)[2], add_special_tokens=False)
    ends = [token for token in after if token in tokenizer.added_tokens_decoder][:1]
    if ends and not set(ends) & set(stop_ids):
        name = tokenizer.convert_ids_to_tokens(ends[0])
        found = token_names(tokenizer, stop_ids) or "nothing"
        yield (f"the chat template ends a turn with {name!r}, but a response ends with {found}: "
               f"set rollout.stop_tokens={name}")


def check_first_prompt(data: SimpleNamespace, tokenizer, prompt: Prompt) -> Iterator[str]:
    """Whether something that the tokenizer or its chat template adds is in the data already."""
    if prompt.token_ids[:2] == [tokenizer.bos_token_id] * 2:
        yield (f"prompts begin with {tokenizer.bos_token!r} twice: the tokenizer adds it; leave it "
               "out of data.prompt_template and the data")
    raw = str(find_column(prompt.row, data.prompt_key))
    marks = [token for token in tokenizer.all_special_tokens if token in raw]
    if marks and data.apply_chat_template and tokenizer.chat_template:
        yield (f"prompts in the data have a chat template's {marks[0]!r} already, and get another "
               "one: set data.apply_chat_template=false")


def check_references(config: SimpleNamespace, accelerator: Accelerator, scorer: Scorer,
                     prompts: Sequence[Prompt]) -> Iterator[str]:
    """Whether a response that gives the reference answer is right, and one that gives the result of
    a reference that is a whole solution: for each of the references, or some if the reward function
    is slow. One of the user's own may read another form: then one that is right is enough."""
    names = split_list(config.reward.name)
    limit = (10_000 if set(names) <= set(IN_TRAINER) else 200 if set(names) <= set(BUILT_IN)
             else 4)
    some = list({prompt.answer: prompt for prompt in prompts if prompt.answer}.values())[:limit]
    tasks = []
    for prompt in some:
        answer = prompt.answer
        result = answer.rpartition("####")[2] if "####" in answer else last_boxed(answer)
        forms = [form.format(text) for text in (result or answer, answer) for form in FORMS]
        tasks.append(Task(forms, [1] * len(forms), answer, prompt.row))
    judged = []
    for task, scores in zip(tasks, map_over_ranks(accelerator, scorer, tasks, "references"),
                            strict=True):
        if all(score.acc is not None and score.status == "ok" for score in scores):
            accs = [score.acc for score in scores]
            judged.append((task.ground_truth, min(max(accs[:len(FORMS)]), max(accs[len(FORMS):]))))
    wrong = [answer for answer, acc in judged if acc < 1]
    if not wrong or (names[0] not in BUILT_IN and len(wrong) < len(judged)):
        return
    regex = next((regex for mark, regex in (("####", "#### (.+)"), (r"\boxed", r"boxed\{(.*)\}"))
                  if mark in wrong[0]), "")
    advice = f"data.answer_regex='{regex}'" if regex else "data.answer_key or data.answer_regex"
    yield (f"reward.name={names[0]}: {len(wrong)} of {len(judged)} reference answers are not right "
           "even if a response gives them after `Answer:` or in a box, the first "
           f"{wrong[0][-60:]!r}: set {advice} so that the answer alone is left, or another "
           "reward.name")
