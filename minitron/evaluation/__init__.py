"""What a model can do: questions with answers to choose from."""
