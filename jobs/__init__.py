"""The jobs that ``main.py`` and the scripts start. It imports the other packages; they do not import it."""
