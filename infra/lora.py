"""LoRA by peft: low-rank adapters beside linear layers are trained, the model's weights frozen.

The adapters stand inside the model, which keeps its class. `distributed.iter_full_weights` gives
merged weights under the names of the base, so that engines and saved models know nothing of LoRA.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from infra.config import split_list

LINEAR = (torch.nn.Linear, Conv1D)  # Conv1D: GPT-2's linear layer


def add_adapters(config: SimpleNamespace, policy: torch.nn.Module) -> str:
    """Freeze the policy and give it adapters, which change nothing yet; returns what was done.

    Raises ValueError if `model.lora_target` does not fit the model.
    """
    from peft import LoraConfig, inject_adapter_in_model  # slow to import
    settings, targets = config.model, find_targets(policy, config.model.lora_target)
    adapter = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha,
                         target_modules=targets, task_type="CAUSAL_LM",
                         fan_in_fan_out=isinstance(policy.get_submodule(targets[0]), Conv1D),
                         base_model_name_or_path=settings.path)
    torch.manual_seed(config.seed)
    inject_adapter_in_model(adapter, policy)
    adapted = {name for name, layer in policy.named_modules() if hasattr(layer, "lora_A")}
    if adapted != set(targets):  # fused experts got some, which would not be merged
        raise ValueError("model.lora_target: peft mistakes layers of MLPs for experts: omit them")
    adapter.target_modules = sorted(targets)  # peft's set has another order in each run
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    for weight in trained:
        weight.data = weight.data.float()  # peft takes the type of the layer: bfloat16, perhaps
    count, total = (sum(map(Tensor.numel, weights)) for weights in (trained, policy.parameters()))
    return (f"LoRA: {len(targets)} layers have adapters of rank {settings.lora_rank}: {count:,} of "
            f"{total:,} parameters are trained")


def find_targets(policy: torch.nn.Module, names: str) -> list[str]:
    """The full names of the layers that `model.lora_target` names. Raises ValueError."""
    modules = dict(policy.named_modules())
    linear = {name: layer for name, layer in modules.items() if type(layer) in LINEAR}
    known = "The linear layers are " + ", ".join(sorted({n.rpartition(".")[2] for n in linear}))
    if names == "all-linear":
        excluded = _unsupported(policy, linear) | {policy.get_output_embeddings()}
        targets = [name for name, layer in linear.items()
                   if layer not in excluded and layer.weight.requires_grad]
    else:
        targets, embeddings = [], policy.get_input_embeddings()
        for part in split_list(names):
            found = [name for name in modules if f".{name}".endswith(f".{part}")]
            if not found or not linear.keys() >= set(found):
                what = "is not a linear layer" if found else "is not in the model"
                raise ValueError(f"model.lora_target: {part} {what}. {known}")
            if any(linear[name].weight is embeddings.weight for name in found):
                raise ValueError(f"model.lora_target: {part} shares its weight with the input "
                                 "embeddings, which an adapter would change too: leave it out")
            targets += [name for name in found if name not in targets]
    if not targets:
        raise ValueError(f"model.lora_target={names!r} names no layer. {known}")
    return targets


def _unsupported(policy: torch.nn.Module, linear: dict[str, torch.nn.Module]) -> set:
    """The layers whose adapters would not be trained, or would be mistaken for the experts'."""
    # Mamba layers, which have a parameter D, read all weights but in_proj's past an adapter.
    found = {part for layer in policy.modules() if hasattr(layer, "D")
             for name, part in layer.named_children() if name != "in_proj"}
    if any(name.endswith("experts.gate_up_proj") for name, _ in policy.named_parameters()):
        names = ".gate_proj", ".up_proj", ".down_proj"  # that experts had before they were fused
        found |= {layer for name, layer in linear.items() if name.endswith(names)}
    return found


class BasePolicy(torch.nn.Module):
    """The policy with its adapters off: the initial policy, without a second copy of it."""
    def __init__(self, policy: torch.nn.Module):
        super().__init__()
        self.module = policy

    def forward(self, **kwargs):
        layers = [layer for layer in self.module.modules() if hasattr(layer, "lora_A")]
        # Not by `enable_adapters`, which changes requires_grad: FSDP2 takes it over only once.
        for layer in layers:
            layer._disable_adapters = True
        try:
            return self.module(**kwargs)
        finally:
            for layer in layers:
                layer._disable_adapters = False


def full_adapters(policy: torch.nn.Module) -> dict[str, Tensor]:
    """The adapters' weights, whole, on the CPU; collective if sharded; {} if there are none."""
    return {name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).cpu()
            for name, weight in policy.state_dict().items() if ".lora_" in name}


def save_adapter(policy: torch.nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Write `full_adapters` in peft's format, for `PeftModel.from_pretrained`."""
    policy.peft_config["default"].save_pretrained(path)
    save_file({f"base_model.model.{name.replace('.default', '')}": weight
               for name, weight in weights.items()}, path / "adapter_model.safetensors")
