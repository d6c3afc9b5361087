"""What a run shows: its metrics file, the console, pictures and the report page."""
