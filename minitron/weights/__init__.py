"""Hugging Face <-> shards: names and layouts from the table, one parameter at a time, by slices of safetensors."""
