"""The tables and figures of Li et al. (2021) with the paper's settings, beside the paper's numbers, claim by claim."""
