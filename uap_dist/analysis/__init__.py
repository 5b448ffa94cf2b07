"""Section 4 of the paper: phase transition, correlated decision boundaries, number of images."""
