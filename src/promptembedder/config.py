"""How settings are parsed: YAML in and out, any of them overridable as `section.name=value`.

The settings themselves live in the rooms that they belong to, as frozen dataclasses with every default.
`None` means unset.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from promptembedder.errors import PromptEmbedderError, shown
from promptembedder.paths import expanded

RULES = ConfigDict(extra="forbid", str_min_length=1, allow_inf_nan=False)
PositiveInt = Annotated[int, Field(ge=1)]
Place = Annotated[str, AfterValidator(lambda path: str(expanded(path)) if path.startswith("~") else path)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
T = TypeVar("T")


@dataclass(frozen=True)
class Retired:
    """A setting that earlier versions had; settings classes list theirs as `RETIRED`, by name.

    Attributes:
        neutral: whether a value changed nothing, given the value and its whole section.
        advice: what to do in place of any other value.
        becomes: the setting that takes the value over; unset: none.
    """

    neutral: Callable[[Any, Mapping[str, Any]], bool]
    advice: str
    becomes: str | None = None


def retired(*neutral: Any, advice: str) -> Retired:
    """A setting that is ignored at these values and refused at others."""
    return Retired(lambda value, _: value in neutral, advice)


def parse(kind: type[T], settings: Mapping[str, Any], where: str) -> T:
    """Check settings and build the dataclass `kind`.

    Raises:
        PromptEmbedderError: unknown name, wrong type or value; names the field, the value and what is valid.
    """
    if (name := _with_nul(settings)) is not None:  # no file has such a name, and Python's own error names no setting
        raise PromptEmbedderError(f"{where}: {name} holds a NUL character")
    try:
        return TypeAdapter(kind).validate_python(_current(kind, settings, where))
    except ValidationError as error:
        raise PromptEmbedderError(f"{where}: {_one_line(error, kind)}") from None


def parse_settings(kind: type[T], settings: Mapping[str, Any], overrides: Sequence[str], where: str) -> T:
    """As `parse`, after `section.name=value` overrides."""
    return parse(kind, overridden(settings, overrides), where=where)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of sections, nothing checked but that.

    Raises:
        PromptEmbedderError: file missing or not YAML.
    """
    path = expanded(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptEmbedderError(
            f"config {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    try:
        settings = yaml.safe_load(text) or {}
    except Exception as error:  # dates that are none, tags on values that they do not fit, too many levels
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PromptEmbedderError(f"config {path} is not YAML: {reason}") from None
    if not isinstance(settings, dict):
        raise PromptEmbedderError(f"config {path} must be a mapping of sections, found {type(settings).__name__}")
    return settings


def dump_yaml(config: Any) -> str:
    """The settings as YAML that `load_run` reads back to an equal object."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False, allow_unicode=True)


def overridden(settings: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Settings after `section.name=value` overrides.

    Raises:
        PromptEmbedderError: an override does not look like that, or names a value as a section.
    """
    result: dict[str, Any] = copy.deepcopy(dict(settings))
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name:
            raise PromptEmbedderError(f"override {override!r} must look like section.name=value")
        *sections, last = name.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise PromptEmbedderError(f"override {override!r}: {section!r} is not a section")
        place[last] = _value(value)
    return result


def _value(text: str) -> Any:
    """What the command line gives, read as YAML; a sentence stays one where YAML sees a mapping or a comment in it."""
    try:
        value = yaml.safe_load(text)
    except Exception:  # as in `read_yaml`
        return text
    if isinstance(value, dict) and (not text.lstrip().startswith("{") or all(v is None for v in value.values())):
        return text  # "Topic: which?", "{text}"
    return text if isinstance(value, str) and " #" in text and " #" not in value else value


def _current(kind: Any, settings: Mapping[str, Any], where: str, path: str = "") -> dict[str, Any]:
    """A section without retired settings.

    Raises:
        PromptEmbedderError: a retired setting has a value that changed something.
    """
    result = dict(settings)
    for name, old in getattr(kind, "RETIRED", {}).items():
        if name not in settings:
            continue
        value = result.pop(name)
        if not _changes_nothing(old, value, settings):
            raise PromptEmbedderError(f"{where}: {path}{name} = {shown(value)} is no longer a setting; {old.advice}")
        if old.becomes is not None and value is not None:
            result.setdefault(old.becomes, value)
    hints = get_type_hints(kind) if is_dataclass(kind) else {}
    for name, value in result.items():
        section = _section(hints.get(name))
        if section is not None and isinstance(value, Mapping):
            result[name] = _current(section, value, where, f"{path}{name}.")
        elif section is not None and isinstance(value, (list, tuple)):
            result[name] = [
                _current(section, item, where, f"{path}{name}.{n}.") if isinstance(item, Mapping) else item
                for n, item in enumerate(value)
            ]
    return result


def _with_nul(settings: Mapping[str, Any]) -> str | None:
    """The first setting whose value holds a NUL character; None where there is none.

    Each section and list is looked at once: YAML can name one many times over, also within itself.
    """
    seen: set[int] = set()
    left: list[tuple[str, Any]] = [("", settings)]
    while left:
        name, value = left.pop()
        if isinstance(value, str) and "\0" in value:
            return name
        if isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            inner = value.items() if isinstance(value, Mapping) else enumerate(value)
            left += [(f"{name}.{key}".lstrip("."), item) for key, item in inner]
    return None


def _changes_nothing(old: Retired, value: Any, section: Mapping[str, Any]) -> bool:
    try:
        return old.neutral(value, section)
    except TypeError:  # of values that are no numbers
        return False


def _one_line(error: ValidationError, kind: type) -> str:
    first = error.errors()[0]
    place = ".".join(" ".join(str(part).split()) for part in first["loc"]) or kind.__name__
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        valid = ", ".join(_valid_names(kind, first["loc"][:-1]))
        return f"unknown setting {place!r}; valid here: {valid}{more}"
    return f"{place} = {shown(first['input'])}: {first['msg']}{more}"


def _valid_names(kind: Any, path: Sequence[int | str]) -> list[str]:
    """Names of the settings of the section that a path of names leads to."""
    for part in path:
        if isinstance(part, str):
            kind = _section(get_type_hints(kind).get(part)) or kind
    return [f.name for f in fields(kind)]


def _section(hint: Any) -> Any:
    """The settings class in a type such as `X`, `X | None` or `tuple[X, ...]`; None where there is none."""
    if is_dataclass(hint):
        return hint
    return next((found for part in get_args(hint) if (found := _section(part)) is not None), None)
