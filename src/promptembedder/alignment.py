"""Alignment: the linear map from the prompter's token-embedding space to the backbone's.

Shapes: K soft tokens, P prompter width, D backbone width, J backbone layers, S shared vocabulary, N prompts.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from promptembedder.errors import PromptEmbedderError

_WORD_MARK = "\u2581"  # sentencepiece's visible blank
_MEASURED_WORDS = 4096
# Of SmolLM2-135M before itself, for which the default rates were found: what `rate_factor` compares with.
_REACH_OF_REFERENCE = 429.0
_BYTE_FALLBACK = re.compile("<0x[0-9A-Fa-f]{2}>")


class Alignment(nn.Module):
    """`W` (P, D), float32: soft prompt (..., K, D) = soft tokens (..., K, P) @ W.

    Args:
        weight_PD: W.
        layers: J, of the backbone, for a deep soft prompt: one more map (P, D) each, started at zero; 0: none.
        rank: R, of these maps, then products of (P, R) and (R, D); unset: whole matrices.
    """

    def __init__(self, weight_PD: Tensor, layers: int = 0, rank: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_PD.detach().to(torch.float32).clone())
        P, D = weight_PD.shape
        self.deep: nn.Parameter | None = None
        self.deep_in: nn.Parameter | None = None
        self.deep_out: nn.Parameter | None = None
        if layers and rank is None:
            self.deep = nn.Parameter(torch.zeros(layers, P, D))
        elif layers and rank is not None:
            # So long that a step of Adam on `deep_out`, whose size does not depend on the gradient's, moves the soft
            # prompt as far as a step on whole matrices would.
            start_JPR = torch.randn(layers, P, rank, generator=torch.Generator().manual_seed(0)) * P**0.5 / rank
            self.deep_in = nn.Parameter(start_JPR)
            self.deep_out = nn.Parameter(torch.zeros(layers, rank, D))

    @property
    def deep_is_zero(self) -> bool:
        """Whether there is a deep soft prompt, and it is still as it starts."""
        last = self.deep if self.deep is not None else self.deep_out
        return last is not None and not last.any()

    def forward(self, tokens_NKP: Tensor) -> Tensor:
        """Map soft tokens (N, K, P) to a soft prompt (N, K, D), float32; a deep one is (N, (1 + layers) K, D).

        The first K rows enter the backbone, the next K are added to the input of its first layer, and so on.
        """
        tokens_NKP = tokens_NKP.to(self.weight.dtype)
        soft_NKD: Tensor = tokens_NKP @ self.weight
        tokens_N1KP = tokens_NKP[:, None]
        if self.deep is not None:
            deep_NJKD = tokens_N1KP @ self.deep
        elif self.deep_in is not None and self.deep_out is not None:
            deep_NJKD = tokens_N1KP @ self.deep_in @ self.deep_out
        else:
            return soft_NKD
        return torch.cat([soft_NKD, deep_NJKD.flatten(1, 2)], dim=1)


def thinned(deep_JPD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (J, P, R) and (J, R, D) of the nearest matrices of rank R (Eckart and Young 1936), both of one length."""
    left, values, right = torch.linalg.svd(deep_JPD.double(), full_matrices=False)
    root_JR = values[:, :rank].sqrt()
    first_JPR, second_JRD = left[..., :rank] * root_JR[:, None], root_JR[..., None] * right[:, :rank]
    return first_JPR.float().contiguous(), second_JRD.float().contiguous()


def identity(P: int, D: int) -> Tensor:
    """The start where prompter and backbone share their embeddings.

    Raises:
        PromptEmbedderError: the widths differ.
    """
    if P != D:
        raise PromptEmbedderError(f"alignment start 'identity' needs equal widths, prompter has {P}, backbone {D}")
    return torch.eye(P)


def random(P: int, D: int, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian entries of variance 1 / P, so that the norm of a soft token is kept on average."""
    weight_PD: Tensor = torch.randn(P, D, generator=generator) * P**-0.5
    return weight_PD


class Moments(NamedTuple):
    """What fits to shared words need of these: sums over words `s`, in float64 on the CPU.

    Attributes:
        gram_PP: `sum_s w_s p_s^T p_s` of the prompter's embeddings `p_s`.
        cross_PD: `sum_s w_s p_s^T b_s` with the backbone's embeddings `b_s`.
        words: S.
    """

    gram_PP: Tensor
    cross_PD: Tensor
    words: int

    def without(self, others: Moments) -> Moments:
        """The moments of the words that are not among `others`, of which they are a part."""
        return Moments(self.gram_PP - others.gram_PP, self.cross_PD - others.cross_PD, self.words - others.words)


def moments(prompter_SP: Tensor, backbone_SD: Tensor, weights_S: Tensor | None = None) -> Moments:
    """Sums over shared words, from which any of the fits below takes a moment.

    Args:
        prompter_SP: the prompter's embeddings of the shared tokens.
        backbone_SD: the backbone's embeddings of the same tokens, in the same order.
        weights_S: importance of each token, not negative; unset: all alike.
    """
    first, second = prompter_SP.double().cpu(), backbone_SD.double().cpu()
    weighted = first if weights_S is None else first * weights_S.double().cpu()[:, None]
    return Moments(weighted.T @ first, weighted.T @ second, len(first))


def least_squares(shared: Moments) -> Tensor:
    """The `W` (P, D) that minimises `||prompter @ W - backbone||_F` over the shared vocabulary.

    By the normal equations, which in float64 leave float32 embeddings their precision.

    Raises:
        PromptEmbedderError: fewer shared tokens than P: the problem has no unique solution.
    """
    P = len(shared.gram_PP)
    if shared.words < P:
        raise PromptEmbedderError(
            f"alignment start 'least_squares' needs at least {P} shared tokens, the vocabularies share "
            f"{shared.words}; use 'random'"
        )
    weight_PD: Tensor = torch.linalg.lstsq(shared.gram_PP, shared.cross_PD, driver="gelsd").solution.float()
    return weight_PD


def ridge(shared: Moments, penalty: float = 1e-2) -> Tensor:
    """The `W` (P, D) that minimises `sum_s w_s ||p_s @ W - b_s||^2 + lambda ||W||_F^2`.

    Defined for any number of shared tokens, unlike `least_squares`.

    Args:
        shared: moments of the shared words.
        penalty: lambda, relative to the mean eigenvalue of the weighted Gram matrix.
    """
    gram_PP = shared.gram_PP.clone()
    gram_PP.diagonal().add_(penalty * float(gram_PP.diagonal().mean()))
    weight_PD: Tensor = torch.linalg.solve(gram_PP, shared.cross_PD).float()
    return weight_PD


def procrustes(shared: Moments) -> Tensor:
    """A rotation with a scale, `c R` (P, D) with orthonormal rows or columns of `R`.

    Orthogonal Procrustes (Schönemann 1966): `R = U V^T` of the singular value decomposition of `prompter^T backbone`,
    `c` = sum of its singular values / `||prompter R||_F^2`. For P <= D the best in least squares; for P > D the `R`
    whose inner product with the backbone's embeddings is largest, which then is not quite the same.
    """
    left, values, right = torch.linalg.svd(shared.cross_PD, full_matrices=False)
    rotation_PD = left @ right
    # ||prompter R||_F^2 = tr(R^T G R).
    weight_PD: Tensor = (rotation_PD * (values.sum() / (shared.gram_PP @ rotation_PD * rotation_PD).sum())).float()
    return weight_PD


def folded(weight_PD: Tensor, tokens_MP: Tensor, wanted_MD: Tensor, penalty: float = 1e-4) -> Tensor:
    """The `W'` closest to `W` (Frobenius norm) that maps given soft tokens to given places.

    `W' = W + S^T (S S^T + lambda I)^-1 (T - S W)`, the smallest correction, for M <= P soft tokens.

    Args:
        weight_PD: W.
        tokens_MP: S, soft tokens of the prompter.
        wanted_MD: T, where they are to go.
        penalty: lambda relative to the mean of the diagonal of `S S^T`; soft tokens can be nearly the same.
    """
    W, S, T = (tensor.detach().double().cpu() for tensor in (weight_PD, tokens_MP, wanted_MD))
    gram_MM = S @ S.T
    gram_MM.diagonal().add_(penalty * float(gram_MM.diagonal().mean()))
    corrected_PD: Tensor = (W + S.T @ torch.linalg.solve(gram_MM, T - S @ W)).float()
    return corrected_PD


def some_words(words_VX: Tensor) -> Tensor:
    """Some thousand rows of a matrix of token embeddings, float32 on the CPU: enough for a median."""
    return words_VX.detach()[:: max(1, len(words_VX) // _MEASURED_WORDS)].float().cpu()


def matched_norm(weight_PD: Tensor, prompter_SP: Tensor, backbone_SD: Tensor) -> Tensor:
    """`W` scaled so that mapped tokens are, at the median, as long as the backbone's own embeddings."""
    mapped_S = (some_words(prompter_SP) @ weight_PD).norm(dim=-1)
    scaled_PD: Tensor = weight_PD * (some_words(backbone_SD).norm(dim=-1).median() / mapped_S.median())
    return scaled_PD


def rate_factor(prompter_VP: Tensor, backbone_VD: Tensor) -> float:
    """What W's learning rate is multiplied by, a power of two, so that a step is as long before any pair of LLMs.

    Adam moves every number of W by about the rate, whatever the gradient, so that one of a soft prompt s W moves by up
    to the rate times |s|_1. How much that is depends on the size of the backbone's words: a step that is right
    for SmolLM2 is seven times too long before Qwen2.5-0.5B and eight times too short before Gemma 3.

    Args:
        prompter_VP: token embeddings as the prompter reads them, all or some (a factor such as gemma's included).
        backbone_VD: the backbone's likewise.
    """
    reach = float(prompter_VP.abs().sum(-1).median()) / float(backbone_VD.square().mean(-1).sqrt().median())
    return 2.0 ** round(math.log2(_REACH_OF_REFERENCE / reach))


def shared_vocabulary(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Token ids (S,) and (S,) of the spellings that two vocabularies share, special tokens left out.

    Spellings are compared as bytes: byte-level BPE (`Ġthe`), sentencepiece (`▁the`) and byte fallbacks
    (`<0x0A>`) come out the same. A byte fallback counts only where no other token has its spelling: no text is ever
    split into it, so that its embedding is untrained.
    """
    spelled_first, spelled_second = _spellings(first), _spellings(second)
    shared = sorted(spelled_first.keys() & spelled_second.keys())
    ids_first = torch.tensor([spelled_first[s] for s in shared], dtype=torch.long)
    ids_second = torch.tensor([spelled_second[s] for s in shared], dtype=torch.long)
    return ids_first, ids_second


def _spellings(tokenizer: PreTrainedTokenizerBase) -> dict[bytes, int]:
    special = set(tokenizer.all_special_ids) | {
        i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # The state of a part is JSON; that of the whole would hold the vocabulary, too, seconds of parsing.
    parts = [] if backend is None else [backend.pre_tokenizer, backend.decoder]
    byte_level = any(part is not None and b"ByteLevel" in part.__getstate__() for part in parts)
    byte_of = _byte_level_alphabet()
    spelled: dict[bytes, int] = {}
    fallbacks: dict[bytes, int] = {}
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if index in special:
            continue
        if byte_level:
            if not all(c in byte_of for c in token):
                continue
            spelling = bytes(byte_of[c] for c in token)
        elif _BYTE_FALLBACK.fullmatch(token):
            fallbacks[bytes([int(token[3:5], 16)])] = index
            continue
        else:
            spelling = token.replace(_WORD_MARK, " ").encode()
        spelled.setdefault(spelling, index)
    return fallbacks | spelled


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, character to byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
