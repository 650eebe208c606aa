"""The engine: requests, a scheduler, a runner, and the loop that joins them."""
