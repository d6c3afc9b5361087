"""Ranking units, and cutting sharded weights in place."""
