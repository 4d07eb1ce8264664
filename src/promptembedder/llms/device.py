"""Devices and the precision that they compute in."""

from __future__ import annotations

import torch

from promptembedder.errors import PromptEmbedderError


def check_device(device: torch.device | str | None) -> None:
    """Refuse a device that this machine or this build of torch does not have.

    Raises:
        PromptEmbedderError: the device cannot be used.
    """
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PromptEmbedderError(f"device {str(device)!r} cannot be used here: {reason}") from error


def resolve_dtype(setting: str, device: torch.device | str | None = None) -> torch.dtype:
    """The dtype the frozen backbone runs in.

    `auto` is bfloat16 on accelerators and on CPUs with bfloat16 instructions, else float32: without the
    instructions bfloat16 matrix products are emulated, 2.5 times slower than float32 (`benchmarks/cpu_precision.py`).
    """
    if setting != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[setting]
    if device is None:
        # Imported here, because sentence-transformers takes seconds. It uses the accelerator, if there is one.
        from sentence_transformers.util import get_device_name

        device = get_device_name()
    kind = torch.device(device).type
    if kind == "cuda":  # older GPUs emulate bfloat16, as some CPUs do
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if kind != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
