"""From windows of token ids to prompts: target positions, templates, streams and cold-start traces."""
