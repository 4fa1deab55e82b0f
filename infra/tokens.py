"""Between token ids and text: what ends a response, responses from token ids, single tokens."""

from collections.abc import Sequence

import numpy as np
from tokenizers.decoders import DecodeStream

from data_types import Response


def stop_token_ids(model, tokenizer) -> list[int]:
    """Every token that ends a response: the model's generation config may name several. Those that
    the model has no embedding of, and so never writes, are left out."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    count = model.get_input_embeddings().num_embeddings
    return sorted(i for i in (ids | {tokenizer.eos_token_id}) - {None} if i < count)


def add_stop_tokens(model, tokenizer, names: Sequence[str]) -> None:
    """Let the tokens called so end responses too, those of the exported model as well. Raises
    ValueError if the tokenizer has no such token."""
    vocabulary = tokenizer.get_vocab() if names else {}
    if unknown := [name for name in names if name not in vocabulary]:
        raise ValueError(f"rollout.stop_tokens: the tokenizer has no token {unknown[0]!r}")
    if names:
        ids = {*stop_token_ids(model, tokenizer), *(vocabulary[name] for name in names)}
        model.generation_config.eos_token_id = sorted(ids)


def make_responses(tokenizer, rows: Sequence[tuple[np.ndarray, np.ndarray | None, bool | str]],
                   n: int) -> list[list[Response]]:
    """Groups of `n` responses, from their token ids, log-probs (None: not asked for), and what
    ended them: the last token (True), a stop string (which), or the limit (False). Raises
    ValueError if a log-prob is not finite.

    The text lacks the token that ended it and those that mark ends and padding (EOS, BOS, ...), but
    has other special tokens, such as <think>, and the stop string.
    """
    names = [name for name in tokenizer.special_tokens_map.values() if isinstance(name, str)]
    left_out = tokenizer.convert_tokens_to_ids(names)
    shown = [ids[:-1] if ended is True else ids for ids, _, ended in rows]
    texts = tokenizer.batch_decode([ids[~np.isin(ids, left_out)] for ids in shown],
                                   skip_special_tokens=False)
    responses = []
    for (ids, logprobs, ended), text in zip(rows, texts, strict=True):
        if logprobs is None:
            logprobs = np.full(len(ids), np.nan, dtype=np.float32)
        elif not np.isfinite(logprobs).all():
            raise ValueError("log-probs are not finite: the policy has diverged, or overflows")
        responses.append(Response(ids, logprobs, text, "stop" if ended else "length"))
    return [responses[i:i + n] for i in range(0, len(responses), n)]


def token_texts(tokenizer, token_ids: np.ndarray) -> list[str]:
    """The text of each token; a character that several tokens make comes with the last of them."""
    backend, texts = getattr(tokenizer, "backend_tokenizer", None), []
    if backend is None:
        return tokenizer.batch_decode([[token] for token in token_ids.tolist()])
    stream = DecodeStream(skip_special_tokens=False)
    for token in token_ids.tolist():
        try:
            texts.append(stream.step(backend, token) or "")
        except Exception:  # incomplete UTF-8
            stream = DecodeStream(skip_special_tokens=False)
            texts.append(backend.decode([token], skip_special_tokens=False))
    return texts
