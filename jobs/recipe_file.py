"""Recipes as YAML files: read with a sentence for each mistake, and written with a comment for each key."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ..storage.root import Root
from ..storage.stores import is_remote
from ..tokenizers.spec import UserError
from .recipe import Corpus, Export, Mistake, Recipe, Section, Source, Units, Vad

Place = tuple[str | int, ...]  # of a key: ("corpus", "sources", 0, "path")

_MAX_BYTES = 1 << 20
_MAX_KEYS = 100_000
_HEADER = """\
# A wavemill recipe: one dataset, from recordings to export.
#
#   wavemill recipe check {name}     says what is wrong with it, or what it would do
#   wavemill run {name}              does it; run it again to go on, or to add what is new
#   wavemill run {name} --set corpus.window=30s --workers 2
#
# Every key stands here with its default, so each can be left out, but for corpus.sources.
# Relative paths count from the folder of this file, wherever the command is started.
"""


def load_recipe(path: str, *, sets: Sequence[str] = (), flags: Mapping[str, tuple[str, Any]] | None = None) -> Recipe:
    """The recipe in a file, with values of `sets` (KEY=VALUE, VALUE in YAML) and then of `flags` put in.

    `flags` are key and value by the flag's name; a value of None is a flag that was not given. Relative paths count
    from the file's folder. Raises `UserError` that names the file, the line and the key.
    """
    raw, lines = _read(path)
    origins = {place: f"{path}, line {line}" for place, line in lines.items()}
    for argument in sets:
        key, value = _parse_set(argument)
        place = _put(raw, key, value, f"--set {argument}")
        origins = {known: origin for known, origin in origins.items() if known[: len(place)] != place}
        origins[place] = f"--set {argument}"
    for flag, (key, value) in (flags or {}).items():
        if value is not None:
            origins[_put(raw, key, value, flag)] = flag
    try:
        folder = path.rpartition("/")[0] if is_remote(path) else os.path.dirname(os.path.abspath(path))
        return Recipe.model_validate(raw, context={"folder": folder})
    except ValidationError as error:
        raise _mistakes(error, path, origins) from error


def default_recipe() -> Recipe:
    """The recipe that `recipe_text` writes down: every default, and one source for example."""
    return Recipe(corpus=Corpus(sources=[Source(path="recordings")]))


def recipe_text(name: str) -> str:
    """A recipe file with every key, its default and a comment. `name` is the file's, for the examples in it."""
    lines = []
    for line in _render(default_recipe()):
        lines += ["", line] if re.match(r"\w+:( |$)", line) else [line]
    return _HEADER.format(name=name) + "\n".join(lines) + "\n"


def write_recipe(path: str, *, force: bool) -> None:
    """Write the commented recipe. Raises `UserError` if there is a file and `force` is not given."""
    try:
        if is_remote(path):
            _write_to_store(path, force=force)
            return
        with Path(path).open("w" if force else "x", encoding="utf-8") as file:
            file.write(recipe_text(os.path.basename(path)))
    except FileExistsError as error:
        raise UserError(f"{path} is there already; name another file, or write over it with --force.") from error
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from error


def _write_to_store(path: str, *, force: bool) -> None:
    folder, _, name = path.rpartition("/")
    content = recipe_text(path).encode()
    if force:
        Root(folder).write_bytes(name, content)
    elif not Root(folder).create(name, content):
        raise FileExistsError(path)


def _read(path: str) -> tuple[dict[str, Any], dict[Place, int]]:
    """The values in a file, and the line of each key."""
    try:
        if is_remote(path):
            folder, _, name = path.rpartition("/")
            content = Root(folder).read_bytes(name)
        else:
            with Path(path).open("rb") as file:
                content = file.read(_MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"There is no recipe {path}. Write one with: wavemill recipe init {path}") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text, so it is no recipe.") from error
    if len(content) > _MAX_BYTES:
        raise UserError(f"{path} has over {_MAX_BYTES >> 20} MiB; no recipe has. Is it another file?")
    lines: dict[Place, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _find_lines(node, (), lines, path, set())
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(_yaml_mistake(error, path, text)) from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply for a recipe.") from error
    except ValueError as error:  # a date such as 2026-13-45
        raise UserError(f"{path} holds a value that YAML cannot read: {error}. Put it in quotes.") from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds {_found(raw)}; a recipe is keys and values: wavemill recipe init shows them.")
    return raw, lines


def _find_lines(node: yaml.Node, place: Place, lines: dict[Place, int], path: str, above: set[int]) -> None:
    """Fill in the line of each key and list entry. Raises `UserError` for a key that is twice or no text."""
    if len(lines) > _MAX_KEYS:  # aliases of aliases grow without end
        raise UserError(f"{path} has over {_MAX_KEYS:,} keys and entries; no recipe has. Give lists as manifests.")
    if id(node) in above:
        raise UserError(f"{path}, line {node.start_mark.line + 1}: an alias (*) leads back to where it stands.")
    above = above | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for number, entry in enumerate(node.value):
            lines[*place, number] = entry.start_mark.line + 1
            _find_lines(entry, (*place, number), lines, path, above)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.tag != "tag:yaml.org,2002:str":
            raise UserError(f"{path}, line {line}: a key must be text; put {_short(str(key.value))} in quotes.")
        if key.value in seen:
            name = _dotted((*place, key.value))
            raise UserError(f"{path}, line {line}: {name} is there twice, first in line {seen[key.value]}; keep one.")
        seen[key.value] = line
        lines[*place, key.value] = line
        _find_lines(value, (*place, key.value), lines, path, above)


def _yaml_mistake(error: yaml.YAMLError, path: str, text: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{path} holds characters that YAML does not take ({_short(str(error).splitlines()[0])}). Is it a text?"
    where = f"{path}, line {mark.line + 1}"
    rows = text.splitlines()
    row = rows[mark.line] if mark.line < len(rows) else ""
    if "\t" in row[: len(row) - len(row.lstrip())] or row[mark.column : mark.column + 1] == "\t":
        return f"{where}: a tab stands where spaces are expected; YAML indents with spaces only."
    problem = getattr(error, "problem", None) or "it cannot be read"
    return (
        f"{where}: this is not YAML ({problem}). Check that keys of one level begin in the same column, that a colon "
        "is followed by a space, and that quotes and brackets are closed."
    )


def _parse_set(argument: str) -> tuple[str, Any]:
    key, equals, text = argument.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {argument!r}: expected KEY=VALUE such as tokenize.workers=2.")
    try:
        return key.strip(), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--set {argument!r}: the value is not YAML; put it in quotes.") from error


def _put(raw: dict[str, Any], key: str, value: Any, origin: str) -> Place:
    """Put a value in its place, making the sections above it; the place. `origin` is what errors begin with."""
    parts = re.findall(r"[^.\[\]]+", key)
    if not parts:
        raise UserError(f"{origin}: {key!r} is no key; write one such as tokenize.workers.")
    place: list[str | int] = []
    inside: Any = raw
    for depth, part in enumerate(parts):
        name = _key_in(inside, part, tuple(place), origin)
        place.append(name)
        if depth == len(parts) - 1:
            inside[name] = value
        elif isinstance(inside, dict) and inside.get(name) is None:
            inside[name] = {}
        inside = inside[name]
    return tuple(place)


def _key_in(inside: Any, part: str, place: Place, origin: str) -> Any:
    """The key or the number that `part` names in the mapping or list at a place."""
    if isinstance(inside, list):
        if part.isdecimal() and int(part) < len(inside):
            return int(part)
        raise UserError(
            f"{origin}: {_dotted(place)} is a list with {len(inside)} entries in this recipe, numbered from 0; "
            f"{part!r} is none of them."
        )
    if not isinstance(inside, dict):
        raise UserError(f"{origin}: {_dotted(place)} is {_found(inside)} in this recipe; it has no keys.")
    return part


def _mistakes(error: ValidationError, path: str, origins: dict[Place, str]) -> UserError:
    """All that is wrong as one sentence: the first mistake in full, the others counted."""
    found = []
    for each in error.errors():
        place: Place = each["loc"]
        cause = each.get("ctx", {}).get("error")
        if isinstance(cause, Mistake):
            place += cause.place
        origin = next((origins[place[:size]] for size in range(len(place), 0, -1) if place[:size] in origins), path)
        line = re.search(r", line (\d+)$", origin)
        # a misspelt key is told before the one that is missing because of it
        order = (int(line[1]) if line else 0, each["type"] != "extra_forbidden")
        found.append((order, f"{origin}: {_sentence(each, place)}"))
    found.sort(key=lambda mistake: mistake[0])
    more = len(found) - 1
    tail = f" ({more} more {'mistake' if more == 1 else 'mistakes'} after this one.)" if more else ""
    return UserError(found[0][1] + tail)


def _sentence(error: Any, place: Place) -> str:
    name, kind, context = _dotted(place), error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        names = list(_section_at(place[:-1]).model_fields)
        near = difflib.get_close_matches(str(place[-1]), names, n=1)
        return f"{name} is unknown; " + (f"did you mean {near[0]}?" if near else f"there are: {', '.join(names)}.")
    if kind == "missing":
        about = _section_at(place[:-1]).model_fields[str(place[-1])].description
        return f"{name} is missing: {about}."
    if kind == "value_error":
        return f"{name}: {context['error']}" if name else str(context["error"])
    expected = _EXPECTED.get(kind)
    if expected is None:
        return f"{name} is {_found(error['input'])}; {error['msg']}."
    hint = ""
    if kind == "string_type" and not isinstance(error["input"], dict | list | None):
        hint = " Put it in quotes."
    return f"{name} is {_found(error['input'])}; expected {expected.format(**context)}.{hint}"


_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a number that is not infinite",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "literal_error": "{expected}",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than_equal": "{le:g} or less",
    "too_short": "at least {min_length}",
}


def _section_at(place: Place) -> type[BaseModel]:
    """The section whose keys stand at a place."""
    section: type[BaseModel] = Recipe
    named = False  # in a mapping whose keys are names
    for part in place:
        if named or isinstance(part, int):
            named = False
            continue
        annotation = section.model_fields[part].annotation
        section = _section_in(annotation) or section
        named = get_origin(annotation) is dict
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def _dotted(place: Place) -> str:
    """`corpus.sources[0].path`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def _found(value: Any) -> str:
    match value:
        case None:
            return "empty"
        case bool():
            return "true" if value else "false"
        case list():
            return "a list" if value else "an empty list"
        case dict():
            return "keys and values" if value else "empty"
        case str():
            return _short(repr(value))
    return _short(str(value))


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _render(section: Section, *, given_only: bool = False) -> list[str]:
    """Lines of a section: each key, its value and its comment."""
    lines: list[str] = []
    for name, field in type(section).model_fields.items():
        value, comment = getattr(section, name), f"  # {field.description}"
        if given_only and name not in section.model_fields_set:
            continue
        if name in _EXAMPLES:  # off by default: what stands there once it is on, as a comment
            off = "null" if value is None else "[]"
            lines.append(f"{name}: {off}{comment} (to turn it on, take {off} and the # below away)")
            lines += [f"#  {line}" for line in _entries(_EXAMPLES[name])]
        elif isinstance(value, Section) or (value and _section_in(field.annotation)):
            lines.append(f"{name}:{comment}")
            lines += [f"  {line}" for line in _entries(value)]
        else:
            lines.append(f"{name}: {_scalar(value)}{comment}")
    return lines


_EXAMPLES: dict[str, Any] = {"vad": Vad(), "units": [Units(stream="semantic")], "export": [Export()]}


def _entries(value: Any) -> list[str]:
    """Lines of a section, a list of sections or sections by name; only the first of several shows every key."""
    if isinstance(value, Section):
        return _render(value)
    lines: list[str] = []
    if isinstance(value, dict):
        for name, section in value.items():
            lines += [f"{name}:", *(f"  {line}" for line in _render(section, given_only=bool(lines)))]
        return lines
    for section in value:
        if isinstance(section, Source):
            lines.append(f"- {section.argument()}")
            continue
        first, *rest = _render(section, given_only=bool(lines))
        lines += [f"- {first}", *(f"  {line}" for line in rest)]
    return lines


def _scalar(value: Any) -> str:
    return yaml.safe_dump([value], default_flow_style=True, width=10_000, allow_unicode=True).strip()[1:-1]
