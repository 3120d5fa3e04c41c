"""Training of the built-in world. docs/training.md describes the stages, their order and their durations."""
