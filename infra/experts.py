"""The routers of mixture-of-experts models."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from losses import load_balancing_loss


def find_routers(model: torch.nn.Module) -> dict[torch.nn.Module, int]:
    """The router of each layer, and the place of its logits among what it returns, as transformers
    names them. Empty if the model has none, or (Jamba) one without a class of its own."""
    for module in model.modules():
        recorder = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        if recorder is not None:
            return {router: recorder.index for router in model.modules()
                    if isinstance(router, recorder.target_class) and hasattr(router, "top_k")}
    return {}


@contextmanager
def record_routing(model: torch.nn.Module, enabled: bool) -> Iterator[dict]:
    """A dict that gets the logits (tokens, E) of each router in a forward pass inside."""
    recorded, handles = {}, []

    def record(place: int, router, _, outputs) -> None:
        recorded[router] = outputs[place].flatten(0, -2)
    if enabled:
        handles = [router.register_forward_hook(partial(record, place))
                   for router, place in find_routers(model).items()]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def router_aux_loss(routing: dict, batch: dict) -> Tensor:
    """The load-balancing loss of each sequence of the batch, (B, 1), the mean over the layers."""
    losses = [load_balancing_loss(logits, batch["sequence_index"], len(batch["mask"]), router.top_k)
              for router, logits in routing.items()]
    return torch.stack(losses).mean(0)[:, None]
