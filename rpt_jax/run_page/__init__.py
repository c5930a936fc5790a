"""The page of a run: `report.html`, one file without network access."""
