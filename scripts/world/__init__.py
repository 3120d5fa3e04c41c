"""Training of the built-in world: README.md of this folder says what runs in which order, and for how long."""
