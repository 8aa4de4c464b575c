"""Where images come from, one kind of source a file; data.py opens them by their name in params.yaml."""
