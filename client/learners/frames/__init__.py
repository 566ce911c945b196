"""What methods are built on: the loop, memories, penalties and projections."""
