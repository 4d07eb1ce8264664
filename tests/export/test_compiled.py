"""Compiled instructions: what the model would embed, without its prompter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import promptembedder
from conftest import ARCHITECTURES, FIRST_QUICK, INSTRUCTION, TEXTS
from promptembedder import PromptEmbedderError
from promptembedder.export.compiled import compile_model, embed_compiled


@pytest.mark.parametrize("architecture", FIRST_QUICK)
@pytest.mark.parametrize(
    "changes", [{}, {"deep_rank": 2}, {"layout": "prefix"}, {"readout": "mean"}, {"linear_head": True}]
)
def test_embeds_as_the_model(tiny_model, architecture, changes):
    model = tiny_model(architecture, **changes)
    if changes == {}:
        model[0].subtract(torch.linspace(-1, 1, 32))
    if "linear_head" in changes:
        torch.nn.init.normal_(model[1].linear.weight, std=0.2)
    compiled = compile_model(model, {"same": INSTRUCTION})
    for name, instruction in (("same", INSTRUCTION), ("document", model.prompts["document"])):
        expected = promptembedder.encode(model, TEXTS, instruction)
        np.testing.assert_allclose(embed_compiled(model, compiled, name, TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("layout", ["prefix", "suffix"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_soft_tokens_are_words_of_a_grown_vocabulary(tiny_model, architecture, layout):
    """One forward of the plain LLM over token ids, its matrix of word embeddings longer by K rows."""
    model = tiny_model(architecture, layout=layout, text_template="Of one:\n{text}\nThe")
    compiled = compile_model(model, {"same": INSTRUCTION})
    lm, K = model[0].backbone.lm, model[0].settings.num_soft_tokens
    table = lm.get_input_embeddings()
    grown = torch.cat([table.weight, compiled.vocabulary_rows("same")]) * compiled.embedding_scale
    first = len(table.weight)
    text_ids = model.tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    ids = compiled.sequence("same", text_ids, range(first, first + K))
    with torch.no_grad():
        hidden = lm(inputs_embeds=grown[ids][None]).last_hidden_state[0, -1]
    expected = promptembedder.encode(model, [TEXTS[0]], INSTRUCTION)[0]
    np.testing.assert_allclose(hidden / hidden.norm(), expected, atol=1e-5)


def test_digests_differ_where_embeddings_do(tiny_model):
    model = tiny_model()
    compiled = compile_model(model, {"same": INSTRUCTION, "topic": "Find the topic."})
    digests = {compiled.digest(name) for name in compiled.prompts}
    assert len(digests) == 3
    assert compile_model(model, {"other": INSTRUCTION}).digest("other") == compiled.digest("same")
    model.max_seq_length = 9
    assert compile_model(model, {"same": INSTRUCTION}).digest("same") not in digests


@pytest.mark.parametrize("named", [{"document": INSTRUCTION}, {"": INSTRUCTION}, {"same": " "}])
def test_refused(tiny_model, named):
    with pytest.raises(PromptEmbedderError, match="instruction"):
        compile_model(tiny_model(), named)
