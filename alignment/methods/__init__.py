"""The alignment methods. A method is one file here and one entry in `METHODS`; assets, reports and jobs follow from it."""

from alignment.methods.table import METHODS, Method, Training

__all__ = ["METHODS", "Method", "Training"]
