"""The name under which the paper's code trains with averaged weights: ``main.py``, to which --model-ema is a flag like any."""

from main import main

if __name__ == "__main__":
    main()
