"""What comes before a run and carries it: its place on machines, what it will take there, whether they are fit for it."""
