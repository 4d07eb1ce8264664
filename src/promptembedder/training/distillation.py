"""Training without labels: a model's similarities follow those of another model.

Shapes: B texts of a batch, I instructions, N texts in all, D and F (or E) widths of student and teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from promptembedder.data.rows import TrainingData

# tau.
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


def texts_with_embeddings(
    texts: Sequence[str], instructions: Sequence[str], embedded_INF: Sequence[NDArray[np.float32]]
) -> TrainingData:
    """Texts with a teacher's embeddings of them (N, F), one dataset per instruction."""
    named = {f"teacher_{n + 1}": instruction for n, instruction in enumerate(instructions)}
    datasets = {
        name: Dataset.from_dict({"anchor": list(texts), "label": list(embedded_NF)})
        for name, embedded_NF in zip(named, embedded_INF, strict=True)
    }
    return TrainingData(DatasetDict(datasets), {name: {"anchor": instruction} for name, instruction in named.items()})
