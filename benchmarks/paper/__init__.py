"""What the papers claim, tried: the tables (claims.py), how an arm is run (arms.py), what is made of the figures. `python -m benchmarks.paper`."""
