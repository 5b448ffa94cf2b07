"""What the comparisons of rules and attacks share."""
