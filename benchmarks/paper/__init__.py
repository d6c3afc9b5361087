"""What benchmarks/claims.py tries: the tables (claims.py), how an arm is run (arms.py), what is made of the figures."""
