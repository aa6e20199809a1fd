"""The command line: one command a file, each of them parse, call, print."""
