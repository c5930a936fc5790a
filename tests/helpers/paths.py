"""Where the repository and its small policy are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
TINY = CONFIGS / "tiny"
