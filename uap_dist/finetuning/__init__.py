"""Section 3.2 of the paper: fine-tuning on a pool, and what it changes."""
