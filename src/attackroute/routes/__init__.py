"""A route, the routes of samples, and their files."""
