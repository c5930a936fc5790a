"""Questions with verifiable answers: sources, splits and difficulty."""
