"""The engine of simulations: virtual clients in batches on Ray's workers."""
