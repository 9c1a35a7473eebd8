"""Models compared: images, metrics and statistics of each, and the report of them."""
