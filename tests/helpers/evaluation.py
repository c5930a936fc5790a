"""A few multiple-choice questions, and the flags of the command `evaluate` that name them."""

from __future__ import annotations

import json
from pathlib import Path

QUESTIONS = [
    {"question": "What is 2 + 2?", "options": ["3", "4"], "answer": "B", "subject": "sums"},
    {"question": "What is 2 + 3?", "options": ["3", "5"], "answer": 1, "subject": "sums"},
    {"question": "What is 3 * 3?", "options": ["9", "4"], "answer": "9", "subject": "products"},
    {"question": "What is 0 * 3?", "options": [], "answer": "9", "subject": "products"},
]


def question_flags(directory: Path, **others: object) -> list[str]:
    """Write the questions, the last of which has no options; return the flags that name them, and flags of other fields."""
    path = directory / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    fields = {
        "questions.source": "path",
        "questions.test_path": path,
        "questions.choices_field": "options",
        "questions.category_field": "subject",
        "questions.test_questions": 0,
        "training.prompts_per_step": 2,
    }
    return [f"--config.{name}={value}" for name, value in {**fields, **others}.items()]
