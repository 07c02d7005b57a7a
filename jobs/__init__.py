"""The jobs that ``main.py`` and the scripts start. This package joins models, data and utils; none of them imports it."""
