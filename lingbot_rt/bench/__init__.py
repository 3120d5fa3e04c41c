"""Measurements that can be repeated: the pipeline on its device, the transports, a served stream as a player has it."""
