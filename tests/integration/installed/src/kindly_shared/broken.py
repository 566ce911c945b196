"""A module that cannot be imported."""

raise OSError("its library is not there")
