"""One file per verb: `run(cfg)` opens the run and does the verb's work, `work(session)` is that work inside an open run.

Stages never import each other; compress.py composes their `work`.
"""
