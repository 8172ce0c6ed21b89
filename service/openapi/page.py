"""The OpenAPI document as one page of HTML: no script, and nothing fetched from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code, pre { font: 13px/1.45 ui-monospace, monospace }
pre { overflow-x: auto; padding: .7rem; background: #8881; border-radius: 6px }
details { border-top: 1px solid #8884; padding: .4rem 0 }
summary { cursor: pointer } b { display: inline-block; min-width: 4.5rem }
"""


def render_page(document: dict[str, Any]) -> str:
    """Return the page of a document."""
    groups: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            shown = "".join(_operation(method, path, operation))
            groups.setdefault(operation["tags"][0], []).append(shown)
    sections = "".join(
        f"<h2>{escape(tag)}</h2>{''.join(operations)}" for tag, operations in groups.items()
    )
    schemas = "".join(
        f'<details id="{escape(name)}"><summary><code>{escape(name)}</code> '
        f"{escape(schema.get('description', ''))}</summary>{_code(schema)}</details>"
        for name, schema in document["components"]["schemas"].items()
    )
    version = escape(document["info"]["version"])
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Graft API</title><style>{_STYLE}</style><h1>Graft API</h1>"
        f'<p>Version {version}, as <a href="openapi.json">OpenAPI</a>.</p>'
        f"{sections}<h2>Schemas</h2>{schemas}</html>"
    )


def _operation(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield (
        f"<details><summary><b>{method.upper()}</b> <code>{escape(path)}</code> "
        f"{escape(operation['summary'])}</summary>"
    )
    for parameter in operation["parameters"]:
        what = escape(parameter.get("description", parameter["in"]))
        yield f"<p><code>{escape(parameter['name'])}</code> {what}</p>"
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"<p>Takes <code>{escape(media)}</code> {_link(content)}</p>"
    for status, answer in operation["responses"].items():
        for media, content in answer["content"].items():
            yield f"<p>{escape(status)}: <code>{escape(media)}</code> {_link(content)}</p>"
    yield "</details>"


def _link(content: dict[str, Any]) -> str:
    schema = content.get("schema", {})
    reference = schema.get("$ref") or schema.get("items", {}).get("$ref")
    if reference is None:
        return ""
    name = escape(reference.rsplit("/", 1)[-1])
    return f'<a href="#{name}">{name}</a>' + (" list" if "items" in schema else "")


def _code(schema: dict[str, Any]) -> str:
    return f"<pre>{escape(json.dumps(schema, indent=1, ensure_ascii=False))}</pre>"
