"""From measured tables to the constants of a cost law: readers and fits, one file per kernel."""
