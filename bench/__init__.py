"""tubelet.bench."""
