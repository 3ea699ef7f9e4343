"""Networks sharded over processes (FSDP2): accelerate shards them, torch.distributed.checkpoint gathers their state."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


def accelerator_for(precision: str, cpu: bool) -> Any:
    """accelerate's Accelerator; with FSDP2 where the launcher asks for it (``--use_fsdp --fsdp_version 2``).

    Raises:
        ValueError: the launcher asks for the first version of FSDP.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state()  # of another training in this process, which had its own precision
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return Accelerator(mixed_precision=precision, cpu=cpu)
    # every process has the weights already, so that none needs them from the first one
    plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version={plugin.fsdp_version}: FSDP2 is needed: accelerate launch --use_fsdp --fsdp_version 2"
        )
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu, fsdp_plugin=plugin)
    if accelerator.device.type == "cpu" and accelerator.num_processes > 1:
        # accelerate leaves FSDP out on CPUs, where torch has it too
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def shard(accelerator: Any, net: nn.Module) -> None:
    """Shard a network that is not trained, as accelerate shards those that are."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    fsdp2_prepare_model(accelerator, net)


def reshard(net: nn.Module) -> None:
    """Give back the gathered parameters, which a network keeps after a pass without a backward pass."""
    from torch.distributed.fsdp import FSDPModule

    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_state(net: nn.Module) -> dict[str, Tensor]:
    """The whole state of a sharded network, on the CPU of the first process (empty on others); all must call it."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    state: Any = get_model_state_dict(net, options=_options())
    return state


def load_full(net: nn.Module, state: dict[str, Any]) -> None:
    """The inverse of :func:`full_state`, with the whole state on every process."""
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    set_model_state_dict(net, state, options=_options())


def full_optimizer(net: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The whole state of a sharded network's optimiser, as that of an unsharded one has it: by number."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state: Any = get_optimizer_state_dict(net, optimizer, options=_options())
    groups: Any = state.get("param_groups", [])  # empty but on the first process
    numbers = {name: i for i, name in enumerate(name for group in groups for name in group["params"])}
    return {
        "state": {numbers[name]: values for name, values in state.get("state", {}).items()},
        "param_groups": [{**group, "params": [numbers[n] for n in group["params"]]} for group in groups],
    }


def load_full_optimizer(net: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """The inverse of :func:`full_optimizer`, with the whole state on every process."""
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    names = [name for name, _ in net.named_parameters()]
    named: Any = {
        "state": {names[i]: values for i, values in state["state"].items()},
        "param_groups": [{**g, "params": [names[i] for i in g["params"]]} for g in state["param_groups"]],
    }
    set_optimizer_state_dict(net, optimizer, named, options=_options())


def _options() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)
