"""Retraining the student from the teacher: losses, the fused head, and the step that runs both models on the same ranks."""
