"""Read weight files safely, and download and cache them. ``models`` and ``utils`` may import this package."""
