"""Files of a corpus: folders, globs and addresses of object stores, known by name and version.

fsspec opens all of them; an object store needs the package that fsspec names, such as s3fs.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

import fsspec
from fsspec.core import url_to_fs

from promptembedder.errors import PromptEmbedderError, shown
from promptembedder.paths import ending, expanded
from promptembedder.text import is_unicode

Kind = Literal["parquet", "jsonl", "csv", "lines"]
_ENDINGS: dict[str, Kind] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".txt": "lines",
}
_MAGIC = "*?["
# What an object store says of a file's state, the surest first.
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "updated")


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus.

    Attributes:
        url: where it is, with its protocol.
        name: relative to the source that it was found in; ids that are made up begin with it.
        size: in bytes.
        version: changes with the file's content.
        kind: its format.
    """

    url: str
    name: str
    size: int
    version: str
    kind: Kind

    @property
    def key(self) -> str:
        """12 hex digits that stand for the file in names of parts."""
        return blake2b(self.url.encode(), digest_size=6).hexdigest()

    @property
    def packed(self) -> bool:
        """Whether it is compressed by gzip."""
        return self.url.lower().endswith(".gz")


def is_address(source: str) -> bool:
    """Whether this is an address such as `s3://bucket/corpus` and no path."""
    return "://" in source


def file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path there; that of a file may hold fsspec's sign of a chain, `::`."""
    if address.startswith("file://"):
        return fsspec.filesystem("file"), address.removeprefix("file://")
    return url_to_fs(address)  # type: ignore[no-any-return]


def _placed(source: str) -> tuple[Any, str]:
    """As `file_system`, of what a user gives; folders have no links and no `..`, so that a file has one address.

    A link to a file keeps its name, which says the format.
    """
    if not is_address(source):
        source = f"file://{expanded(source).absolute()}"
    fs, path = file_system(source)
    if source.startswith("file://"):
        folder, name = (path, "") if os.path.isdir(path) else os.path.split(path)
        path = os.path.join(os.path.realpath(folder), name).rstrip("/") or "/"
    return fs, path


def whole_address(source: str) -> str:
    """A source or an output as it is for every process: absolute, with its protocol."""
    with opening(source):
        fs, path = _placed(source)
        return str(fs.unstrip_protocol(path)).rstrip("/")


def find_files(sources: Sequence[str], kind: Kind | None, leave_out: str) -> list[SourceFile]:
    """Files of all sources in a fixed order: that of the sources, then by name.

    Args:
        sources: files, folders, globs or addresses. A folder is read with all folders in it; hidden files, and those
            whose name begins with an underscore, are no part of it.
        kind: format of all files; unset: by their endings.
        leave_out: address of the output, which may lie in a source.

    Raises:
        PromptEmbedderError: a source is not there or holds no file; files of several formats, or of none that is known.
    """
    found: dict[str, tuple[str, dict[str, Any], bool]] = {}
    for source in sources:
        for url, name, info, alone in _found(source):
            if not f"{url}/".startswith(f"{leave_out}/"):
                if not is_unicode(url):
                    raise PromptEmbedderError(f"source file {shown(url)}: its name is not valid UTF-8; rename it")
                found.setdefault(url, (name, info, alone))
    if not found:
        raise PromptEmbedderError(f"no files in {', '.join(sources)}")
    names = [name for name, _, _ in found.values()]
    clear = len(set(names)) == len(names)
    files = [
        SourceFile(url, name if clear else url, int(info["size"] or 0), _version(info), kind or _kind_of(url, alone))
        for url, (name, info, alone) in found.items()
    ]
    first: dict[Kind, SourceFile] = {}
    for file in files:
        first.setdefault(file.kind, file)
    if len(first) > 1:
        listed = ", ".join(f"{kind} ({file.name})" for kind, file in sorted(first.items()))
        raise PromptEmbedderError(
            f"sources hold files of several formats: {listed}; choose with a glob such as 'corpus/*.parquet'"
        )
    return files


def _found(source: str) -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    """Address, name, facts of each file of a source, and whether it is the source itself."""
    with opening(source):
        fs, path = _placed(source)
        magic = any(sign in source for sign in _MAGIC) and not (not is_address(source) and fs.exists(path))
        if magic:
            fixed = posixpath.dirname(path[: min(path.find(sign) for sign in _MAGIC if sign in path)])
            infos = {name: info for name, info in fs.glob(path, detail=True).items() if info["type"] == "file"}
        elif fs.isdir(path):
            fixed, infos = path.rstrip("/"), fs.find(path, detail=True)
        elif fs.exists(path):
            yield fs.unstrip_protocol(path), posixpath.basename(path), fs.info(path), True
            return
        else:
            raise PromptEmbedderError(f"source {source} cannot be read: no such file or folder")
        for name in sorted(infos):
            inner = name.removeprefix(fixed).lstrip("/")
            if magic or not any(part[0] in "._" for part in inner.split("/")):
                yield fs.unstrip_protocol(name), inner, infos[name], False


def _kind_of(url: str, alone: bool) -> Kind:
    name = ending(url).removesuffix(".gz")
    if name in _ENDINGS:
        return _ENDINGS[name]
    if alone and name not in (".json", ".tsv"):
        return "lines"
    raise PromptEmbedderError(
        f"source file {url}: its ending says no format of {', '.join(_ENDINGS)}; "
        "choose files with a glob such as 'corpus/*.parquet', or give --format"
    )


def _version(info: dict[str, Any]) -> str:
    state = next((str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None), "")
    return blake2b(f"{info['size']} {state}".encode(), digest_size=8).hexdigest()


@contextmanager
def opening(source: str) -> Iterator[None]:
    """Errors of file systems and of their clients as one line that names a source.

    Raises:
        PromptEmbedderError: the source cannot be read.
    """
    try:
        yield
    except PromptEmbedderError:
        raise
    except ImportError as error:  # fsspec names the package to install
        raise PromptEmbedderError(f"source {source} cannot be read: {error}") from error
    except (OSError, ValueError) as error:
        raise PromptEmbedderError(f"source {source} cannot be read: {_reason(error)}") from error
    except Exception as error:  # of a client, such as botocore, which has classes of its own
        if type(error).__module__.partition(".")[0] in ("promptembedder", "builtins"):
            raise
        raise PromptEmbedderError(f"source {source} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    found = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return str(found)[:300]


def open_file(file: SourceFile) -> Any:
    """A source file, opened for reading bytes; compressed as it lies there."""
    fs, path = file_system(file.url)
    return fs.open(path, "rb")
