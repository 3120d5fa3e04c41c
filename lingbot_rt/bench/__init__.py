"""Repeatable measurements: the pipeline on its device, collectives, transports, and a stream as its client sees it."""
