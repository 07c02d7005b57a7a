"""``main.py`` with the EMA enabled by default, for compatibility with the commands of the reference implementation."""

from main import main

if __name__ == "__main__":
    main(ema=True)
