"""What the numbers of a run say: statistics, plots and a page to look at samples with."""
