"""The command line: one command a file, each of them parse, call, print.

In come words; out go tables and notes, documents in a folder, and an exit code. Read `app.py` first, then `options.py`,
where options that commands share are declared; `arguments.py` makes parsers of them.
"""
