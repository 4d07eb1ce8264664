"""Format `onnx`: graphs from token ids to finished embeddings, for ONNX Runtime in any language; deep soft prompts too.

    onnx/model.onnx        soft prompts of all instructions, one of which the input `instruction` chooses by its number
    onnx/<name>.onnx       one instruction, for engines that know the two usual inputs alone
    onnx/model.onnx_data   weights, which all of these graphs read

Shapes: N texts, B texts of a batch, P instructions, I instruction tokens, R rows of a soft prompt, D backbone width,
E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from promptembedder import atomic
from promptembedder.errors import PromptEmbedderError, needs_extra
from promptembedder.export.compiled import DOCUMENT, Compiled, CompiledInstruction
from promptembedder.export.grown_tokenizer import write_plain
from promptembedder.export.onnx_readme import readme
from promptembedder.model.folder import read_json
from promptembedder.model.module import soft_prompt_module
from promptembedder.text import BLANK_READ_AS

HOLDS_DEEP = True
PRECISION = "float32"
PRECISIONS = ("float32",)
# Where transformers.js looks for graphs.
GRAPHS = "onnx"
ALL = "model"
INSTRUCTIONS_FILE = "instructions.json"
# Initializers of a graph: one row for each instruction.
_SOFT, _BEFORE, _BEFORE_MASK = "soft_prompts", "instruction_ids", "instruction_mask"
_TABLES = {"soft_BRD": _SOFT, "before_BI": _BEFORE, "before_mask_BI": _BEFORE_MASK}
_CHOICE = "instruction"
# Weights below this are in the graphs themselves.
_SMALL = 1024
_BATCH = 16


def refuse(compiled: Compiled) -> None:
    """Refuse an instruction whose graph would take the name of the one for all instructions.

    Raises:
        PromptEmbedderError: one is named so.
    """
    if ALL in compiled.prompts:
        raise PromptEmbedderError(f"{GRAPHS}/{ALL}.onnx holds all instructions: give instruction {ALL!r} another name")


def write(compiled: Compiled, model: SentenceTransformer, folder: Path) -> None:
    """Write graphs, weights, tokenizer and a README into an empty folder.

    Args:
        compiled: instructions that the model's prompter has read.
        model: has the backbone and its tokenizer.
        folder: exists, and is empty.

    Raises:
        PromptEmbedderError: as in `refuse`; a backbone that torch cannot trace, or a tokenizer without tokenizer.json.
        MissingExtraError: extra `onnx` is not installed.
    """
    refuse(compiled)
    with needs_extra("onnx", "export to onnx"):
        import onnx
    from promptembedder.export.onnx_module import trace

    write_plain(soft_prompt_module(model).tokenizer, compiled.max_text_tokens, folder)
    place = folder / GRAPHS
    place.mkdir()
    with TemporaryDirectory(dir=folder) as scratch:  # weights beyond 2 GB are many files
        trace(compiled, model, Path(scratch) / "body.onnx")
        proto = onnx.load(Path(scratch) / "body.onnx")
    proto.producer_name, proto.producer_version = "promptembedder", version("promptembedder")
    weights = f"{ALL}.onnx_data"
    onnx.external_data_helper.convert_model_to_external_data(proto, location=weights, size_threshold=_SMALL)
    proto = onnx.external_data_helper.write_external_data_tensors(proto, str(place))
    _choose_by_number(proto)
    _write_prompts(proto, {}, list(compiled.prompts.values()), folder)
    config = {
        "model_type": "promptembedder",  # of no LLM, so that transformers.js runs the graph as it is
        "transformers.js_config": {"dtype": "fp32", "use_external_data_format": {f"{ALL}.onnx": 1}},
    }
    atomic.write_json(folder / "config.json", config)
    atomic.write_text(folder / "README.md", readme(compiled, read_instructions(folder), folder.name))


def add(compiled: Compiled, model: SentenceTransformer, folder: Path) -> None:
    """Put further instructions into an export; its weights are not written again.

    Args:
        compiled: the new instructions, `document` among them, which is left out.
        model: the export's.
        folder: of the export.

    Raises:
        PromptEmbedderError: as in `refuse`; soft prompts of another shape than those in the folder.
        MissingExtraError: extra `onnx` is not installed.
    """
    refuse(compiled)
    with needs_extra("onnx", "export to onnx"):
        import onnx
    proto = onnx.load(folder / GRAPHS / f"{ALL}.onnx", load_external_data=False)
    held = _table(proto, _SOFT).shape[1:]
    new = [prompt for name, prompt in compiled.prompts.items() if name != DOCUMENT]
    if any(tuple(prompt.rows.shape) != held for prompt in new):
        raise PromptEmbedderError(
            f"{folder} holds soft prompts of shape {held}, the new ones have {tuple(new[0].rows.shape)}; "
            "export all instructions again"
        )
    _write_prompts(proto, read_instructions(folder), new, folder)
    atomic.write_text(folder / "README.md", readme(compiled, read_instructions(folder), folder.name))


def read_instructions(folder: Path) -> dict[str, dict[str, Any]]:
    """What a folder says of its instructions, by name: `number` and `instruction`, its words."""
    found: dict[str, dict[str, Any]] = read_json(folder / INSTRUCTIONS_FILE)
    return found


def _choose_by_number(proto: Any) -> None:
    """Put tables of all instructions, still empty, in place of a graph's inputs of one soft prompt for each text."""
    from onnx import TensorProto, helper, numpy_helper

    graph = proto.graph
    taken = {given.name: given for given in graph.input if given.name in _TABLES}
    for given in taken.values():
        graph.input.remove(given)
    graph.input.append(helper.make_tensor_value_info(_CHOICE, TensorProto.INT64, ["one_or_batch"]))
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["batch_of_texts"], start=0, end=1),
        helper.make_node("Expand", [_CHOICE, "batch_of_texts"], ["number_of_each"]),
    ]
    for name, given in taken.items():
        nodes.append(helper.make_node("Gather", [_TABLES[name], "number_of_each"], [name], axis=0))
        sizes = [one.dim_value for one in given.type.tensor_type.shape.dim[1:]]
        kind = np.float32 if name == "soft_BRD" else np.int64
        graph.initializer.append(numpy_helper.from_array(np.zeros((0, *sizes), kind), _TABLES[name]))
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def _write_prompts(
    proto: Any, held: dict[str, dict[str, Any]], new: Sequence[CompiledInstruction], folder: Path
) -> None:
    """Write the graph of all instructions with new ones behind those held, a graph for each new one, and the list."""
    soft_PRD = np.concatenate([_table(proto, _SOFT), [prompt.rows.numpy() for prompt in new]])
    _set_table(proto, _SOFT, soft_PRD)
    if any(table.name == _BEFORE for table in proto.graph.initializer):
        ids_PI, mask_PI = (_table(proto, name) for name in (_BEFORE, _BEFORE_MASK))
        longest = max([ids_PI.shape[1], *(len(prompt.ids) for prompt in new)])
        rows = [np.array(prompt.ids, np.int64) for prompt in new]
        ids_PI = _grown(ids_PI, rows, longest)
        mask_PI = _grown(mask_PI, [np.ones_like(row) for row in rows], longest)
        _set_table(proto, _BEFORE, ids_PI)
        _set_table(proto, _BEFORE_MASK, mask_PI)
    _save(proto, folder / GRAPHS / f"{ALL}.onnx")
    for number, prompt in enumerate(new, start=len(held)):
        held[prompt.name] = {"number": number, "instruction": prompt.instruction}
        _save(_of_one(proto, number), folder / GRAPHS / f"{prompt.name}.onnx")
    atomic.write_json(folder / INSTRUCTIONS_FILE, held)


def _of_one(proto: Any, number: int) -> Any:
    """The graph without its input `instruction`, for one instruction."""
    from onnx import ModelProto, numpy_helper

    one = ModelProto()
    one.CopyFrom(proto)
    for name in _TABLES.values():
        if any(table.name == name for table in one.graph.initializer):
            _set_table(one, name, _table(one, name)[[number]])
    (choice,) = (given for given in one.graph.input if given.name == _CHOICE)
    one.graph.input.remove(choice)
    one.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), _CHOICE))
    return one


def _grown(table_PI: NDArray[np.int64], rows: Sequence[NDArray[np.int64]], longest: int) -> NDArray[np.int64]:
    """A table with further rows, padded on the right with zeros."""
    return np.array([np.pad(row, (0, longest - len(row))) for row in [*table_PI, *rows]], np.int64)


def _table(proto: Any, name: str) -> NDArray[Any]:
    from onnx import numpy_helper

    (table,) = (table for table in proto.graph.initializer if table.name == name)
    values: NDArray[Any] = numpy_helper.to_array(table)
    return values


def _set_table(proto: Any, name: str, values: NDArray[Any]) -> None:
    from onnx import numpy_helper

    (table,) = (table for table in proto.graph.initializer if table.name == name)
    table.CopyFrom(numpy_helper.from_array(values, name))


def _save(proto: Any, path: Path) -> None:
    """Write a graph beside, and not over, a file: in a scratch copy that is linked to an export it is the export's."""
    with atomic.replacing(path) as file:
        file.write_bytes(proto.SerializeToString())


def reader(folder: Path, name: str) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """Open the graph of all instructions with ONNX Runtime, on the CPU.

    Args:
        folder: as in `write`.
        name: of the instruction.

    Returns:
        Texts to embeddings (N, E).

    Raises:
        MissingExtraError: extra `onnx` is not installed.
    """
    with needs_extra("onnx", "the check of an export to onnx"):
        import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = onnxruntime.InferenceSession(folder / GRAPHS / f"{ALL}.onnx", providers=["CPUExecutionProvider"])
    number = np.array([read_instructions(folder)[name]["number"]])

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        found = []
        for start in range(0, len(texts), _BATCH):
            some = [text if text.strip() else BLANK_READ_AS for text in texts[start : start + _BATCH]]
            read = tokenizer.encode_batch(some)
            inputs = {
                "input_ids": np.array([one.ids for one in read]),
                "attention_mask": np.array([one.attention_mask for one in read]),
                _CHOICE: number,
            }
            found += session.run(None, inputs)
        return np.concatenate(found)

    return embed
