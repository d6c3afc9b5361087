"""Text -> tokens -> samples, on Megatron's indexed datasets.

sources.py says what a source string names and reads its documents; tokenizing.py turns them into token ids; holdout.py chooses the held-out
documents; prepare.py writes `run.dir/data/` and manifest.py describes it; corpus.py reads it back as training samples, windows and batches,
and lengths.py tells from numbers of tokens alone how many windows there are.
"""
