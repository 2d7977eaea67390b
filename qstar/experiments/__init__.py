"""Training a policy on data from q* and from its rivals: `python -m qstar.experiments`; what was found is in README.md.

Every experiment is a table of cells; a cell is run once for each seed and gives a few numbers.
"""
