"""Markers of the response format: reasoning, the end-of-thinking marker, then the prediction in a box."""

from __future__ import annotations

BOX = "\\boxed{"  # Opens the box that holds the prediction; "}" closes it.
