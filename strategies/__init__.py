"""The server half: one method a file, and `base.py`, which speaks Flower for all of them."""
