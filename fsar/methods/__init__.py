"""One module for each published method."""
