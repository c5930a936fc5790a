"""Where the repository and its small policy are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
TINY = CONFIGS / "tiny"
# Config files of experiments; those of studies return another type.
EXPERIMENTS = sorted(path for path in CONFIGS.glob("*.py") if not path.name.startswith("study_"))
