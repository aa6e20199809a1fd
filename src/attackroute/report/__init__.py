"""A run, or two, as one HTML page that can be mailed: no server, no network, the data inside.

In comes a folder of documents, routes and a network (`run_folder`), with what is measured for the page (`measuring`,
`pictures`); out goes a page (`page`, `two_runs`), filled from the templates in ``assets/``, with the data of a drawing
(`route_view`) that a script makes. Read `page` first. A new experiment needs no change here: its document says itself
what it is called and where it stands.
"""
