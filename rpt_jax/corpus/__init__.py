"""Text corpora: reading, splitting, tokenizing and scoring documents."""
