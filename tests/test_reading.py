"""A file that may not be read is not called one that is not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from promptembedder import PromptEmbedderError
from promptembedder.paths import check_readable, is_there


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that other users may enter, as they may not that of `tmp_path`."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o700)
    shutil.rmtree(folder)


def by_another_user(act: Callable[[], object]) -> str:
    """What an act raises, in a fork that is not root."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            act()
        except PromptEmbedderError as error:
            os.write(theirs, str(error).encode())
        except BaseException as error:
            os.write(theirs, repr(error).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    os.waitpid(child, 0)
    with os.fdopen(ours) as said:
        return said.read()


def test_closed_and_missing_files(shared: Path) -> None:
    (shared / "file").write_text("secret")
    (shared / "inner").mkdir()
    (shared / "inner" / "file").write_text("secret")
    check_readable(shared / "file")
    assert (is_there(shared / "file"), is_there(shared / "none"), is_there(shared / "file" / "below")) == (
        True,
        False,
        False,
    )
    assert not is_there(Path("no\0name"))
    with pytest.raises(PromptEmbedderError, match="none cannot be read: No such file or directory"):
        check_readable(shared / "none")
    (shared / "file").chmod(0)
    (shared / "inner").chmod(0)
    assert by_another_user(lambda: is_there(shared / "file")) == ""
    for act, path in ((check_readable, shared / "file"), (is_there, shared / "inner" / "file")):
        assert by_another_user(lambda act=act, path=path: act(path)) == f"{path} cannot be read: Permission denied"


def test_an_llm_and_a_model_of_another_user(shared: Path, tiny_lm, tiny_model) -> None:
    from promptembedder import load, save
    from promptembedder.bulk.bridge import load as load_bridge
    from promptembedder.llms.locate import locate
    from promptembedder.llms.open import load_causal_lm

    lm, model, gguf = Path(shutil.copytree(tiny_lm(), shared / "lm")), shared / "model", shared / "x.gguf"
    save(tiny_model(), model)
    gguf.write_bytes(b"GGUF")
    weights, adapter = lm / "model.safetensors", model / "prompter" / "adapter_model.safetensors"
    reads = {
        weights: lambda: load_causal_lm(locate(str(lm)), None),
        lm / "config.json": lambda: locate(str(lm)),
        gguf: lambda: locate(str(gguf)),
        adapter: lambda: load(model),
        model / "alignment.safetensors": lambda: load(model),
        model / "promptembedder.json": lambda: load(model),
    }
    for path, act in reads.items():
        path.chmod(0)
        assert by_another_user(act) == f"{path} cannot be read: Permission denied"
        path.chmod(0o644)
    assert by_another_user(lambda: load_bridge(adapter)).endswith("is not a bridge: 'facts'")
    adapter.chmod(0)
    assert by_another_user(lambda: load_bridge(adapter)) == f"{adapter} cannot be read: Permission denied"


def test_a_converted_llm_is_open_to_others(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors writes files for their owner alone."""
    import torch
    from safetensors.torch import save_file

    from promptembedder.llms import convert

    def fake(gguf: Path, output: Path, source: str) -> None:
        (output / "config.json").write_text("{}")
        save_file({"w": torch.ones(2)}, output / "model.safetensors")

    monkeypatch.setattr(convert, "_convert_gguf", fake)
    monkeypatch.setenv(convert.CACHE_ENV, str(shared / "cache"))
    part = shared / "part"
    part.write_bytes(b"gguf")
    folder = convert.converted("llm", convert.sha256_of([part]), [part])
    assert by_another_user(lambda: check_readable(folder / "model.safetensors")) == ""
    assert by_another_user(lambda: convert.converted("llm", "", [part])) == ""
    (shared / "cache").chmod(0o700)
    told = by_another_user(lambda: convert.converted("llm", "", [part]))
    assert told == f"{folder / 'config.json'} cannot be read: Permission denied"
    (shared / "cache").chmod(0o755)
    told = by_another_user(lambda: convert.converted("other", "", [part]))
    assert (
        told
        == f"cache folder {shared / 'cache'} cannot be written: Permission denied; set {convert.CACHE_ENV} to another"
    )
