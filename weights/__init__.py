"""Read weight files safely, and download them once. This is the lowest layer: ``models`` and ``utils`` may import it."""
