"""HTML pages that need no other file, from the templates of this package."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rpt_jax import __version__


def render_html(template: str, script: str, data: Mapping[str, Any], **values: Any) -> str:
    """Return a page as HTML that needs no other file.

    Everything that comes from outside is escaped by the template, or is JSON that the page's script inserts as text. Besides, the
    page's policy lets the browser run its own scripts only and connect to nothing but the server that it is from.

    Args:
      template: file name of the template.
      script: file name of the page's script, which runs after Plotly and `common.js`.
      data: what the script reads, as JSON values.
      values: what the template reads beside the version, the style and the scripts.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rpt_jax.run_page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [get_plotlyjs(), _resource("common.js"), _resource(script)]
    page = environment.get_template(template).render(
        version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=Markup(_resource("page.css")),
        policy=_content_policy(scripts),
        scripts=[Markup(script) for script in scripts],
        data=Markup(_embedded_json(data)),
        **values,
    )
    return page.encode("utf-8", "backslashreplace").decode()  # JSON can hold what UTF-8 cannot.


def _resource(name: str) -> str:
    return (resources.files("rpt_jax.run_page") / "templates" / name).read_text(encoding="utf-8")


def _embedded_json(value: Mapping[str, Any]) -> str:
    """Return JSON that can stand in a <script> element: without characters that could end it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _content_policy(scripts: Sequence[str]) -> str:
    """Return the Content-Security-Policy that allows these scripts, by their digests, and no others."""
    digests = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {digests}; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'"
    )
