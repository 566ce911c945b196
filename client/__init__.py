"""All that runs at the edge: data and task streams, models, learners, local state. Imports neither
Flower nor Ray."""
