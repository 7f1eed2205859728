"""Training of the two stages, and the worlds they learn from."""
