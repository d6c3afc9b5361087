"""The directional claims of the Minitron papers (arXiv 2407.14679, "P1", and 2408.11796, "P2"), tried out at a size that a laptop can afford.

`python -m benchmarks.paper --help` says how; claims.py is the table of what is tried, verdicts.py what is made of the figures.
"""
