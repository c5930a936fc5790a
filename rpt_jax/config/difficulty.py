"""The difficulty levels of positions (RPT, 2506.08007, section 4.1)."""

from __future__ import annotations

# Level -> entropy in nats above which a position belongs to it. The levels are nested: a hard position is also an easy one.
DIFFICULTIES = {"easy": 0.5, "medium": 1.0, "hard": 1.5}
