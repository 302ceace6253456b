"""homefire: the training-and-sampling lifecycle for research loops, on hardware that you own."""

__version__ = "0.1.0"
