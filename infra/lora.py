"""LoRA by peft: low-rank adapters beside linear layers are trained, the model's weights frozen.

The adapters stand inside the model, which keeps its class. `distributed.iter_full_weights` gives
merged weights under the names of the base, so that engines and saved models know nothing of LoRA.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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
    try:
        inject_adapter_in_model(adapter, policy)
    except ValueError as error:  # a kind of layer whose kernels would not run its adapter
        raise ValueError(f"model.lora_target: {error} {_linear_layers(policy)}") from None
    adapter.target_modules = sorted(adapter.target_modules)  # a set has another order in each run
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    for weight in trained:
        weight.data = weight.data.float()  # peft takes the type of the layer: bfloat16, perhaps
    count, total = (sum(weight.numel() for weight in weights)
                    for weights in (trained, policy.parameters()))
    return (f"LoRA: {len(targets)} layers have adapters of rank {settings.lora_rank}: {count:,} of "
            f"{total:,} parameters are trained")


def find_targets(policy: torch.nn.Module, names: str) -> list[str]:
    """The full names of the layers that `model.lora_target` names."""
    head, embeddings = policy.get_output_embeddings(), policy.get_input_embeddings()
    modules = dict(policy.named_modules())
    if names == "all-linear":  # but the head, and what is frozen already
        targets = [name for name, layer in modules.items() if isinstance(layer, LINEAR)
                   and layer is not head and layer.weight.requires_grad
                   and not _is_read_by_mamba_kernel(policy, name)]
        targets = _without_expert_names(policy, targets)
    else:
        targets = []
        for part in split_list(names):
            found = [name for name in modules if f".{name}".endswith(f".{part}")]
            if not found or not all(isinstance(modules[name], LINEAR) for name in found):
                what = "is not a linear layer" if found else "is not in the model"
                raise ValueError(f"model.lora_target: {part} {what}. {_linear_layers(policy)}")
            if any(modules[name].weight is embeddings.weight for name in found):
                raise ValueError(f"model.lora_target: {part} shares its weight with the input "
                                 "embeddings, which an adapter would change too: leave it out")
            if _without_expert_names(policy, found) != found:
                raise ValueError(f"model.lora_target: peft takes {part} for the fused experts, "
                                 "which are not linear layers: leave it out")
            targets += [name for name in found if name not in targets]
    if not targets:
        raise ValueError(f"model.lora_target={names!r} names no layer. {_linear_layers(policy)}")
    return targets


def _linear_layers(policy: torch.nn.Module) -> str:
    leaves = {name.rpartition(".")[2] for name, layer in policy.named_modules()
              if isinstance(layer, LINEAR) and not name.endswith((".default", ".base_layer"))}
    return f"The linear layers are {', '.join(sorted(leaves))}"


def _is_read_by_mamba_kernel(policy: torch.nn.Module, name: str) -> bool:
    """Whether peft refuses the layer, since kernels of Mamba take its weight past its adapter."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
    try:
        _check_lora_target_modules_mamba(LoraConfig(), policy, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def _without_expert_names(policy: torch.nn.Module, targets: list[str]) -> list[str]:
    """Those that peft leaves alone: in mixtures of experts it takes some linear layers, of shared
    experts above all, for the names that fused experts had in older versions of transformers."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    try:
        convert_peft_config_for_transformers(adapter := LoraConfig(target_modules=targets), policy,
                                             None)
    except ValueError:  # a part of what it would fuse
        return []
    return [name for name in targets if name in adapter.target_modules]


class BasePolicy(torch.nn.Module):
    """The policy with its adapters off: the initial policy, without a second copy of it."""
    def __init__(self, policy: torch.nn.Module):
        super().__init__()
        self.module = policy

    def forward(self, **kwargs):
        with adapters_off(self.module):
            return self.module(**kwargs)


@contextmanager
def adapters_off(policy: torch.nn.Module) -> Iterator[None]:
    """The layers of the policy compute without their adapters."""
    layers = [layer for layer in policy.modules() if hasattr(layer, "lora_A")]
    # Not by `enable_adapters`, which changes requires_grad: FSDP2 takes it over only once.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def full_adapters(policy: torch.nn.Module) -> dict[str, Tensor]:
    """The adapters' weights, whole, on the CPU; collective if sharded; {} if there are none."""
    weights = {}
    for name, weight in policy.state_dict().items():
        if ".lora_" in name:
            weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
            weights[name] = weight.cpu()
    return weights


def save_adapter(policy: torch.nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Write `full_adapters` in peft's format, for `PeftModel.from_pretrained`."""
    policy.peft_config["default"].save_pretrained(path)
    save_file({f"base_model.model.{name.replace('.default', '')}": weight
               for name, weight in weights.items()}, path / "adapter_model.safetensors")
