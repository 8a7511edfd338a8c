"""The shipped text-to-image model (`pipeline/`), and the script that trains it (`train.py`)."""
