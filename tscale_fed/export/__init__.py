"""Models that come from, or go to, other programs.

- `original.py`   what a checkpoint file of the original TScale holds, read without loading a weight
"""
