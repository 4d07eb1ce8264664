"""Training without labels: a model's similarities follow those of another model.

Shapes: B texts of a batch, I instructions, N texts in all, D and F (or E) widths of student and teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from promptembedder.data.rows import TrainingData
from promptembedder.model.encode import encode
from promptembedder.model.module import soft_prompt_module

# tau in a transfer.
TEMPERATURE = 0.05


class SimilarityDistillation(nn.Module):
    """Loss: the model's in-batch similarities follow those of given teacher embeddings.

    `KL(softmax(T T^t / tau) || softmax(S S^t / tau))` over the rows of a batch, the diagonal left out; teacher
    and student may have different widths, because only similarities are compared.

    Args:
        model: the student; its embeddings have unit length.
        temperature: tau of both softmaxes.
    """

    def __init__(self, model: SentenceTransformer, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, sentence_features: Sequence[dict[str, Any]], labels: Tensor) -> Tensor:
        """The loss of a batch; `labels` (B, F) are the teacher's embeddings of the texts."""
        (features,) = sentence_features
        student_BD = self.model(features)["sentence_embedding"]
        teacher_BF = nn.functional.normalize(labels.to(student_BD.dtype), dim=-1)
        return nn.functional.kl_div(
            self._log_weights(student_BD), self._log_weights(teacher_BF), log_target=True, reduction="batchmean"
        )

    def _log_weights(self, embeddings_BX: Tensor) -> Tensor:
        similarity_BB = embeddings_BX @ embeddings_BX.T / self.temperature
        itself_BB = torch.eye(len(similarity_BB), dtype=torch.bool, device=similarity_BB.device)
        # Finite, because a product of a zero weight with an infinite logarithm is not a number.
        return torch.log_softmax(similarity_BB.masked_fill(itself_BB, -1e4), dim=-1)


def distillation_rows(
    teacher: SentenceTransformer, texts: list[str], instructions: Sequence[str], max_text_tokens: int | None = None
) -> TrainingData:
    """Texts with the old model's embeddings of them, one dataset per instruction; cut as the student will cut them."""
    with soft_prompt_module(teacher).truncating(max_text_tokens):
        embedded_INE = encode(teacher, texts, list(instructions), show_progress_bar=True)
    datasets = {
        f"task_{n + 1}": Dataset.from_dict({"anchor": texts, "label": embedded_NE.tolist()})
        for n, embedded_NE in enumerate(embedded_INE)
    }
    prompts = {f"task_{n + 1}": {"anchor": instruction} for n, instruction in enumerate(instructions)}
    return TrainingData(DatasetDict(datasets), prompts)
