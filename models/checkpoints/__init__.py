"""Read weight files safely, download and cache them, and load them into models."""
