"""Weight files: reading them safely and downloading them once. The bottom layer: ``models`` and ``utils`` may import it."""
