"""The sequence: Prefect flows and the command line. What happens in which order; no tensors."""
