"""``main.py`` under the name that the reference gives to training with averaged weights: they are on unless turned off."""

from main import main

if __name__ == "__main__":
    main(ema=True)
