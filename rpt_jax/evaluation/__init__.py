"""Evaluation of a policy: next-token accuracy, questions, multiple choice and reasoning patterns."""
