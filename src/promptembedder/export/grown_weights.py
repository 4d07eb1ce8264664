"""The backbone as a plain LLM whose vocabulary holds the soft tokens.

Shapes: V rows of the backbone's word embeddings, W words of the grown tokenizer, K soft tokens, D backbone width.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from promptembedder.errors import PromptEmbedderError
from promptembedder.export.compiled import Compiled
from promptembedder.export.grown_tokenizer import GrownTokenizer
from promptembedder.llms.quiet import quiet_transformers

Precision = Literal["float32", "float16", "bfloat16"]


def write_weights(
    lm: PreTrainedModel, compiled: Compiled, tokenizer: GrownTokenizer, folder: Path, precision: Precision
) -> None:
    """Write `config.json` and safetensors of the backbone with W rows of word embeddings.

    The output head is the matrix of word embeddings (tied), whatever the backbone's is: no embedding depends on it.

    Args:
        lm: the backbone.
        compiled: holds the soft tokens.
        tokenizer: decides their ids.
        folder: where to.
        precision: dtype of the weights.

    Raises:
        PromptEmbedderError: a weight is too large for the precision, or the LLM has no form with an output head.
    """
    dtype: torch.dtype = getattr(torch, precision)
    decoder = lm.get_decoder() if hasattr(lm, "get_decoder") else lm
    config = copy.deepcopy(lm.config.get_text_config(decoder=True))
    config.vocab_size, config.tie_word_embeddings = tokenizer.words, True
    config.pad_token_id = tokenizer.pad_id  # some name a row that is gone now
    config.name_or_path = ""
    with quiet_transformers():
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        whole.base_model.load_state_dict(_state(decoder, compiled, tokenizer, dtype), assign=True)
        whole.tie_weights()
        _fill(whole, dtype)
        whole.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # the library's files are for their owner alone; servers run as somebody else
    (folder / "generation_config.json").unlink(missing_ok=True)
    _add_older_spellings(folder / "config.json")


def _state(decoder: Any, compiled: Compiled, tokenizer: GrownTokenizer, dtype: torch.dtype) -> dict[str, Tensor]:
    table = decoder.get_input_embeddings().weight
    (name,) = (name for name, weight in decoder.named_parameters() if weight is table)
    state = {n: w.detach().cpu() for n, w in decoder.state_dict().items()}
    state = {n: w.to(dtype) if w.is_floating_point() else w for n, w in state.items() if n != name}
    grown_WD = torch.zeros(tokenizer.words, table.shape[1])
    kept = min(len(table), tokenizer.words)  # some LLMs have spare rows, some tokenizers words without a row
    grown_WD[:kept] = table[:kept].detach().float().cpu()
    for prompt, ids in tokenizer.soft_ids.items():
        grown_WD[list(ids)] = compiled.vocabulary_rows(prompt)
    grown_WD[list(tokenizer.tail_ids)] = grown_WD[list(compiled.tail_ids)]
    state[name] = grown_WD.to(dtype)
    for n, weight in state.items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise PromptEmbedderError(f"weight {n} is not finite in {str(dtype)[6:]}; export in bfloat16 or float32")
    return state


def _fill(whole: PreTrainedModel, dtype: torch.dtype) -> None:
    """Zeros for what only an output head has that is not tied, such as a bias."""
    for module in whole.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta:
                setattr(
                    module, name, nn.Parameter(torch.zeros_like(weight, device="cpu", dtype=dtype), requires_grad=False)
                )


def _add_older_spellings(file: Path) -> None:
    """Name the rotary base and dtype as engines did that do not know transformers 5."""
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    of_full = rope.get("full_attention", rope)
    if "rope_theta" in of_full:
        config.setdefault("rope_theta", of_full["rope_theta"])
    if "rope_theta" in rope.get("sliding_attention", {}):
        config.setdefault("rope_local_base_freq", rope["sliding_attention"]["rope_theta"])
    if of_full.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", {k: v for k, v in of_full.items() if k != "rope_theta"})
    config["torch_dtype"] = config["dtype"]
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
