"""Figures over results: thin functions that notebooks and papers call. Imports ``sim``; ``sim`` never imports this."""
