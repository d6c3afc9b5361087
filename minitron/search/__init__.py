"""Candidate architectures: which lie within a budget, and which of them to take."""
