"""Frames of methods: the loop, memories, penalties and projections."""
