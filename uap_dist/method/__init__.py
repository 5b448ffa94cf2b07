"""The paper's method: DeepFool increments, updates and projections as pure functions, and what configures them."""
