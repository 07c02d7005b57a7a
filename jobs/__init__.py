"""The jobs that ``main.py`` and the scripts start. This package uses models, data and utils; none of them imports it."""
