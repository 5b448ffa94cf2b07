"""The cost of a run before it starts: time, worker-hours, data and memory, by size of the fleet."""
