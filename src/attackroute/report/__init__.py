"""A run as one HTML page that can be mailed: no server, no network, the data inside."""
