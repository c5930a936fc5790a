"""From a record with fields to the text of a document."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rpt_jax.config import DataConfig
from rpt_jax.corpus.json_files import parse_json
from rpt_jax.errors import UserError, nearest

AUTO = "auto"
BY_FILE = "file"
_PLACEHOLDER = re.compile(r"\{(\w+(?:\.\w+)*)\}")
_MESSAGE_FIELDS = ("content", "value", "text")  # Where messages, and parts of messages, hold their text.
_MESSAGE_SEPARATOR = "\n\n"


class InvalidRecordError(Exception):
    """A record that is not a valid document, with a short reason and a detailed description that follows its location."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class RecordText(NamedTuple):
    """The text of a document.

    Attributes:
      text: unchanged.
      group: value of the field `data.group_by`; "" = none.
      place: byte where a piece of a text file begins; -1 for a record.
    """

    text: str
    group: str = ""
    place: int = -1


class RecordParser(NamedTuple):
    """What the readers of files make of a record.

    Attributes:
      fields: fields that are read, such as "doc.text"; other columns of a table are skipped.
      parse: returns what is made of a record, its values by field name, or an `InvalidRecordError`.
      max_bytes: limit of the text in a record, which a reader derives the limit of a whole record from.
    """

    fields: Sequence[str]
    parse: Callable[[Any], Any]
    max_bytes: int

    def columns(self, names: Sequence[str]) -> list[str]:
        """Return those of the columns `names` of a table that are read; all of them, if none is."""
        needed = {field if field in names else field.partition(".")[0] for field in self.fields}
        return [name for name in names if name in needed] or list(names)

    def parse_json(self, raw: bytes) -> Any:
        """Return what is made of a record that is a JSON object, or an `InvalidRecordError`."""
        try:
            record = parse_json(decode(raw))
        except InvalidRecordError as error:
            return error
        except (ValueError, RecursionError) as error:
            return InvalidRecordError("not JSON", f"is not JSON: {error}. A .jsonl file has one JSON object per line.")
        return self.parse(record)


def document_parser(config: DataConfig) -> RecordParser:
    """Return the parser of documents; `config` is section `data` of their part of the mixture."""
    fields = text_fields(config)
    if config.group_by not in (AUTO, BY_FILE):
        fields.append(config.group_by)
    return RecordParser(fields, functools.partial(record_text, config=config), config.max_document_bytes)


def check_fields(config: DataConfig) -> None:
    """Check the fields that say what a document is. Raises: UserError."""
    if config.document_template and not _PLACEHOLDER.search(config.document_template):
        raise UserError(
            f"data.document_template={config.document_template!r} has no field in braces, so that all documents would be equal: "
            "write, e.g., '{problem}{solution}'.",
            field="data.document_template",
        )


def text_fields(config: DataConfig) -> list[str]:
    """Return the fields whose values are the text of a document."""
    return placeholders(config.document_template) or [config.text_field]


def placeholders(template: str) -> list[str]:
    """Return the fields in braces of a template, each once."""
    return list(dict.fromkeys(_PLACEHOLDER.findall(template)))


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replace the placeholders of a template. All are replaced in one pass, because a value may itself contain braces."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def record_text(record: Any, config: DataConfig) -> RecordText | InvalidRecordError:
    """Return the field `data.text_field`, or `data.document_template` with its placeholders replaced by fields.

    A list of strings or of messages is joined with blank lines.

    Args:
      record: values by field name.
      config: section `data` of the record's part of the mixture.

    Returns: the text, or why it has none.
    """
    if not isinstance(record, Mapping):
        expected = f"the fields {', '.join(text_fields(config))}"
        if not config.document_template:
            expected = f"the field '{config.text_field}'"
        detail = f"is a JSON {type(record).__name__}: expected an object with {expected}."
        return InvalidRecordError("not a JSON object", detail)
    option = "data.document_template" if config.document_template else "data.text_field"
    try:
        values = {
            field: text_of_value(find_field(record, field, option), field)
            for field in dict.fromkeys(text_fields(config))
        }
        group = _group(record, config)
    except InvalidRecordError as error:
        return error
    if not config.document_template:
        return RecordText(values[config.text_field], group)
    return RecordText(fill(config.document_template, values), group)


def decode(data: bytes) -> str:
    """Decode UTF-8. Raises: InvalidRecordError."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(data[error.start], error.start) from None


def not_utf8(byte: int, offset: int | None = None) -> InvalidRecordError:
    """Return the error for a byte that is not UTF-8; `offset` is its place in the record, if it is known."""
    where = "" if offset is None else f" at byte {offset} of the record"
    return InvalidRecordError("not UTF-8", f"is not UTF-8: byte 0x{byte:02x}{where}. Convert the file to UTF-8.")


def find_field(record: Mapping[str, Any], field: str, option: str) -> Any:
    """Return a field, such as "text", "doc.text" or "messages.0.content". Raises: InvalidRecordError, if there is none.

    A field whose name has dots itself comes first. `option` is the config field that names it, for the error.
    """
    if field in record:
        return record[field]
    value: Any = record
    for name in field.split("."):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            expected = f"'{field}' of {option}" if option.endswith("_template") else f"{option}='{field}'"
            fields = list(value) if isinstance(value, Mapping) else []
            where = "" if value is record else f", because there is no '{name}' in it"
            detail = (
                f"has no field {expected}{where}; its fields: {', '.join(fields) or 'none'}.{nearest(name, fields)}"
            )
            raise InvalidRecordError("no such field", detail)
    return value


def text_of_value(value: Any, field: str) -> str:
    """Return a string, or the texts of a list. Raises: InvalidRecordError, for other values and bytes that are not UTF-8."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return decode(value)
    if isinstance(value, list):
        return _MESSAGE_SEPARATOR.join(text_of_value(_message_text(item), field) for item in value)
    detail = f"has a {type(value).__name__} in its field '{field}', expected a string or a list of messages."
    raise InvalidRecordError("not a string", detail)


def _message_text(message: Any) -> Any:
    """Return the text of a message such as {"role": "user", "content": "…"}; what is not a message is returned as it is."""
    if isinstance(message, Mapping):
        return next((message[name] for name in _MESSAGE_FIELDS if name in message), message)
    return message


def _group(record: Mapping[str, Any], config: DataConfig) -> str:
    """Return the value of the field `data.group_by` as a string; "" if it is null or no field is named."""
    if config.group_by in (AUTO, BY_FILE):
        return ""
    value = find_field(record, config.group_by, "data.group_by")
    if value is None:
        return ""
    if isinstance(value, bytes):
        return decode(value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
