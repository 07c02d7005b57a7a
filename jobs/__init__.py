"""The jobs that ``main.py`` and the scripts start. This package imports models, data and utils, which do not import it."""
