"""Devices, memory and what work on them costs."""
