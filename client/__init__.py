"""All that runs at the edge.

Data and task streams, models, learners, local state. Imports neither Flower nor Ray.
"""
