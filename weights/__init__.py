"""Read weight files safely, and download them once. Bottom layer: ``models`` and ``utils`` may import it."""
