"""Hypothesis strategies for malformed files and values."""

from __future__ import annotations

import json

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Settings of a fuzz test, to be used as a decorator.
many = settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
# Any JSON value.
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def altered(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with one to three ranges overwritten, deleted or repeated, or the end cut off."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        start, size = draw(st.integers(0, len(changed))), draw(st.integers(0, 20))
        kind = draw(st.sampled_from(["write", "cut", "repeat", "end"]))
        if kind == "write":
            changed[start : start + size] = draw(st.binary(min_size=size, max_size=size))
        elif kind == "cut":
            del changed[start : start + size]
        elif kind == "repeat":
            changed[start:start] = changed[start : start + size] * draw(st.integers(1, 50))
        else:
            del changed[start:]
    return bytes(changed)


@st.composite
def altered_json(draw: st.DrawFn, content: dict) -> bytes:
    """JSON with one to three of its values, at any depth, replaced, renamed or deleted."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        parent = content
        while True:
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(parent[key], dict | list) and parent[key] and draw(st.booleans()):
                parent = parent[key]
                continue
            change = draw(st.sampled_from(["replace", "delete", "rename"]))
            if change == "delete":
                del parent[key]
            elif change == "rename" and isinstance(parent, dict):
                parent[draw(st.text(max_size=8))] = parent.pop(key)
            else:
                parent[key] = draw(values)
            break
    return json.dumps(content).encode()
