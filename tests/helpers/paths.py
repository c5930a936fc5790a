"""Where the repository and its small policy are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
TINY = CONFIGS / "tiny"
# Config files of studies, and those of experiments, which return another type.
STUDIES = sorted(CONFIGS.glob("study_*.py"))
EXPERIMENTS = sorted(set(CONFIGS.glob("*.py")) - set(STUDIES))
