"""LoRA students: small trained matrices on a base that is the teacher's own (Hu et al. 2022, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..denoiser import Denoiser
from ..identity import weights_hash
from ..process import Flow
from .adapters import Conditioned, seeded
from .weights import own_parameters, sharing

_ABOUT = "_fastsample_lora"


def with_lora(net: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """A network with LoRA matrices on the parameters of ``net``, which it shares; it starts as ``net``.

    Only the matrices (and what else is added later, such as an adapter for a step size) are trained, averaged
    and saved. They are float32 whatever the base is.

    Args:
        net: any module; it is left as it is, but frozen.
        options: of ``peft.LoraConfig``: ``r``, ``target_modules``, ``lora_alpha``, ``lora_dropout``, ...

    Raises:
        ImportError: peft is not installed.
        ValueError: options that peft refuses, or modules that the network has not.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("LoRA students are made by peft: pip install 'fastsample[peft]'") from error
    base = weights_hash(_denoiser(net))
    result = sharing(net)
    try:
        with seeded("lora"):
            inject_adapter_in_model(LoraConfig(**options), result)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lora={dict(options)!r}: {error}; give what peft.LoraConfig takes, such as "
            "{'r': 16, 'target_modules': ['to_q', 'to_k', 'to_v', 'to_out.0']}"
        ) from error
    for parameter in own_parameters(result):
        parameter.data = parameter.data.float()
    setattr(result, _ABOUT, {"options": dict(options), "base": base})
    return result


def lora_of(net: Any) -> dict[str, Any] | None:
    """The options and the base's hash of a network with LoRA matrices; None where it has none."""
    inner = net.net if isinstance(net, Conditioned) else net
    return getattr(inner, _ABOUT, None)


def again(net: nn.Module, about: Mapping[str, Any]) -> nn.Module:
    """The network that :func:`lora_of` described, with fresh matrices, on its base.

    Raises:
        ValueError: ``net`` is not that base.
    """
    result = with_lora(net, about["options"])
    found = lora_of(result)
    assert found is not None
    if found["base"] != about["base"]:
        raise ValueError(
            "the student is LoRA matrices on other weights than these (their hash is "
            f"{found['base']}, the base's {about['base']}); give the teacher it was trained from, in the same precision"
        )
    return result


def _denoiser(net: nn.Module) -> Denoiser:
    return Denoiser(net, Flow(), "flow")  # only its weights are looked at
