"""What ``scripts/fuzz.py`` tries: one file per target, each with a ``try_case(random)``."""
