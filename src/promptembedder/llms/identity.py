"""Identify an LLM by its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch


def fingerprint(lm: torch.nn.Module) -> str:
    """Identify an LLM by its weights: sha256 over names, shapes and 64 spread values of every parameter.

    Values are compared as bfloat16, so that a float32 and a bfloat16 copy of one checkpoint agree. Adapter
    weights (LoRA) are left out; names are taken without the prefixes that peft adds.
    """
    return digest({_plain_name(n): p for n, p in lm.named_parameters() if "lora_" not in n})


def digest(named: Mapping[str, torch.Tensor]) -> str:
    """The hash that `fingerprint` computes of an LLM, of any tensors by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        values = tensor.detach().reshape(-1)
        picked = values[:: max(1, values.numel() // 64)][:64]
        found.update(f"{name}{tuple(tensor.shape)}".encode())
        found.update(picked.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return found.hexdigest()


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
