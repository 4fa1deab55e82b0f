"""vLLM's weight transfer `nccl` on a CPU: TCP in place of NCCL, all else is vLLM's own.

A plugin of the servers that test_vllm_server.py starts; that file installs it for the trainer too.
"""

import torch


class Group:
    def __init__(self, group):
        self.group = group

    def broadcast(self, tensor, src, stream):
        tensor.copy_(self.group.broadcast_obj(tensor.clone(), src))


def install(setattr=setattr):
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.distributed.weight_transfer import nccl_common

    def connect(host, port, rank, world_size, device):
        group = StatelessProcessGroup.create(host=host, port=port, rank=rank, world_size=world_size)
        return Group(group)
    setattr(nccl_common, "stateless_init_process_group", connect)
    setattr(torch.accelerator, "current_device_index", lambda: 0)
    setattr(torch.accelerator, "synchronize", lambda: None)
    setattr(torch.cuda, "current_stream", lambda: None)
