"""bfloat16 weights on CPUs that have no bfloat16 instructions: kept in bfloat16, multiplied in float32.

Such CPUs emulate bfloat16 matrix products, 2.5 times slower than float32 ones (`benchmarks/cpu_precision.py`). Widening
one weight matrix just before its product costs little compared with a product over hundreds of tokens. The values stay
the same, because every bfloat16 is a float32. Only one widened matrix exists at a time.

Shapes: L any leading dimensions, I inputs, O outputs of a linear layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from promptembedder.llms.copies import sharing_copy
from promptembedder.llms.device import cpu_has_bfloat16


class _WidenedProduct(torch.autograd.Function):
    """`inputs @ weight.T + bias` with a frozen weight; keeps the narrow weight for backward, not the widened one."""

    @staticmethod
    def forward(ctx: Any, inputs_LI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI)
        bias_O = None if bias_O is None else bias_O.to(inputs_LI.dtype)
        return functional.linear(inputs_LI, weight_OI.to(inputs_LI.dtype), bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (weight_OI,) = ctx.saved_tensors
        (gradient_LO,) = gradients
        return gradient_LO @ weight_OI.to(gradient_LO.dtype), None, None


class WidenedLinear(nn.Module):
    """A frozen linear layer whose weight is widened to its input's dtype for each product.

    Args:
        linear: the layer whose weights are used, not copied.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's output, in the dtype of its input."""
        return _WidenedProduct.apply(inputs, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]


def helps(lm: nn.Module) -> bool:
    """Whether an LLM's products are faster widened: bfloat16 weights on a CPU without bfloat16 instructions.

    All layers must be linear layers, embeddings or root-mean-square norms, which compute in float32 anyway. Other
    layers require inputs of their weights' dtype.
    """
    weight = next(lm.parameters())
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or cpu_has_bfloat16():
        return False
    return is_tokenwise(lm)


def is_tokenwise(lm: nn.Module) -> bool:
    """Whether only linear layers, embeddings and root-mean-square norms have weights: each token is treated alone."""
    return all(_is_known(module) for module in lm.modules() if any(True for _ in module.parameters(recurse=False)))


def _is_known(module: nn.Module) -> bool:
    return type(module) is nn.Linear or isinstance(module, nn.Embedding) or type(module).__name__.endswith("RMSNorm")


def widened(lm: nn.Module) -> nn.Module:
    """A view of a frozen LLM that computes in float32: the same weights in memory, `WidenedLinear` for its layers.

    Its inputs must be float32 embeddings; all values between its layers are then float32, too.
    """
    view = sharing_copy(lm)
    for module in list(view.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, WidenedLinear(child))
    return view
